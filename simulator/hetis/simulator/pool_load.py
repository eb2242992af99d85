"""The load of one micro-batch on the devices of a stage copy with a pool."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from hetis.simulator.growth import KvGrowth
from hetis.simulator.values import IntArray


class Decoding(Protocol):
    """The part of a micro-batch that a pool reads (`MicroBatch`)."""

    index: int
    step: int
    growth: KvGrowth
    decoding: dict[int, int]
    chunk: list[tuple[int, int, bool]]


class PoolLoad:
    """Load of one micro-batch's decoding requests on D devices: pairs with head groups, and their tokens."""

    __slots__ = ("groups", "growing", "looked", "tokens")

    def __init__(self, devices: int) -> None:
        self.groups = np.zeros(devices, np.int64)
        self.growing = np.zeros(devices, np.int64)  # of requests within the sliding window
        self.tokens = np.zeros(devices)
        self.looked = 0  # step of the last check by re-dispatch

    def add(self, groups: IntArray, attended: float, *, grows: bool) -> None:
        self.groups += groups
        self.tokens += groups * attended
        if grows:
            self.growing += groups

    def grow(self, growth: KvGrowth) -> None:
        """Let the context of every request grow by one token."""
        self.tokens += growth.first_slope * self.growing + growth.slope * (self.groups - self.growing)
