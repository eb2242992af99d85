"""Other systems' rules for placing the heads of a new request, to replace `HeadAllocator.rule`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hetis.solver.dispatch.problem import DeviceLoad, FloatArray, IntArray, Requests, Stage

_ROUNDS = 60  # of bisection, down to the precision of floats


@dataclass(frozen=True, slots=True)
class Placed:
    """Head groups of one request on each device, shape [1, D]. ``unplaced`` names it if it has to wait."""

    groups: IntArray
    unplaced: Sequence[str]


@dataclass(frozen=True, slots=True)
class EqualSplit:
    """A rule that puts the same share of every request on every device. The remainder goes to the devices in turn."""

    stage: Stage

    def dispatch(self, load: DeviceLoad, requests: Requests) -> Placed:
        num = self.stage.num_devices
        room = _room(self.stage, load, requests)
        counts = np.zeros(num, np.int64)
        # The device with the fewest heads comes first, so that all end up with equal numbers.
        order = np.argsort(load.heads, kind="stable")
        for _ in range(self.stage.heads.head_groups):
            takes = [i for i in order if counts[i] < room[i]]
            if not takes:
                return _waits(num, requests)
            counts[min(takes, key=lambda i: int(counts[i]))] += 1
        return Placed(counts[None], ())


@dataclass(frozen=True, slots=True)
class PrimaryOnly:
    """All heads on the primary, as in engines without attention workers."""

    stage: Stage

    def dispatch(self, load: DeviceLoad, requests: Requests) -> Placed:
        counts = np.zeros(self.stage.num_devices, np.int64)
        counts[0] = self.stage.heads.head_groups
        if counts[0] > _room(self.stage, load, requests)[0]:
            return _waits(len(counts), requests)
        return Placed(counts[None], ())


@dataclass(frozen=True, slots=True)
class PaperRule:
    """Hetis (SC'25): ``min z, z >= tau_i + rho_i`` in fractions, running requests fixed, then rounded to KV groups.

    For one request that linear program is water filling: every device is filled to the same time z, within its memory.
    Constants of devices without heads count as paid. Groups left by rounding down go to the largest fractions.
    """

    stage: Stage

    def dispatch(self, load: DeviceLoad, requests: Requests) -> Placed:
        groups, room = self.stage.heads.head_groups, _room(self.stage, load, requests)
        if room.sum() < groups:
            return _waits(len(room), requests)
        x = self.fractions(load, requests)
        counts = np.floor(x + 1e-9).astype(np.int64)
        for i in np.argsort(counts - x, kind="stable").tolist() * groups:
            if counts.sum() < groups and counts[i] < room[i]:
                counts[i] += 1
        return Placed(counts[None], ())

    def fractions(self, load: DeviceLoad, requests: Requests) -> FloatArray:
        """Return the head groups of the request on each device before rounding, shape [D]. The request must fit."""
        groups, room = self.stage.heads.head_groups, _room(self.stage, load, requests)
        base, slope = self._lines(load, int(requests.context_tokens[0]))
        low, high = 0.0, float((base + slope * groups).max())
        for _ in range(_ROUNDS):
            z = (low + high) / 2
            low, high = (low, z) if _filled(z, base, slope, room).sum() >= groups else (z, high)
        return _filled(high, base, slope, room)

    def _lines(self, load: DeviceLoad, context_tokens: int) -> tuple[FloatArray, FloatArray]:
        """Return the seconds [D] of each device's running load, and those [D] that one more head group would add."""
        stage, heads = self.stage, self.stage.heads
        away = np.array([not stage.has_primary_at(i) for i in range(stage.num_devices)])
        per_head = stage.head_s[:, 0] + away * stage.transfer_byte_s * heads.exchange_bytes_per_head
        base = per_head * load.heads + stage.kv_byte_s[:, 0] * load.kv_bytes + stage.call_s[:, 0]
        base += away * stage.transfer_s
        slope = per_head * heads.queries_per_group
        slope = slope + stage.kv_byte_s[:, 0] * context_tokens * heads.kv_bytes_per_token
        return base, np.maximum(slope, 1e-15)


def _filled(z: float, base: FloatArray, slope: FloatArray, room: IntArray) -> FloatArray:
    filled: FloatArray = np.clip((z - base) / slope, 0.0, room)
    return filled


def _room(stage: Stage, load: DeviceLoad, requests: Requests) -> IntArray:
    """Return the head groups of the request that each device has pages for, shape [D]."""
    room: IntArray = np.maximum(load.free_blocks, 0) // int(requests.blocks(stage.heads.block_tokens)[0])
    return room


def _waits(num: int, requests: Requests) -> Placed:
    return Placed(np.zeros((1, num), np.int64), requests.ids)
