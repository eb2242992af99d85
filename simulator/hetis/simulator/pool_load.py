"""What one micro-batch has on the devices of a stage copy with a pool."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from hetis.simulator.growth import KvGrowth
from hetis.simulator.values import IntArray


class Decoding(Protocol):
    """What a pool looks at of a micro-batch (`MicroBatch`)."""

    index: int
    step: int
    growth: KvGrowth
    decoding: dict[int, int]
    chunk: list[tuple[int, int, bool]]


class PoolLoad:
    """What the decoding requests of one micro-batch have on D devices: pairs with head groups, and their tokens."""

    __slots__ = ("groups", "growing", "looked", "tokens")

    def __init__(self, devices: int) -> None:
        self.groups = np.zeros(devices, np.int64)
        self.growing = np.zeros(devices, np.int64)  # of requests within the sliding window
        self.tokens = np.zeros(devices)
        self.looked = 0  # step at which re-dispatch looked last

    def add(self, groups: IntArray, attended: float, *, grows: bool) -> None:
        self.groups += groups
        self.tokens += groups * attended
        if grows:
            self.growing += groups

    def grow(self, slope: float) -> None:
        """Every request attends to one token more, or to ``slope`` beyond the sliding window."""
        self.tokens += self.growing + slope * (self.groups - self.growing)
