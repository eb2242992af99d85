"""The times of every device of a stage by cause, for reports and explanations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis.solver.dispatch.problem import FloatArray, IntArray, Stage
from hetis.solver.dispatch.snapshot import StateSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTime:
    """Seconds per layer and decode step of a device, on the slowest affine piece; all 0 if it holds no heads.

    ``heads_s`` is for query heads and their exchange with the primary, ``kv_s`` for reading KV, ``call_s`` for the
    fixed cost of calls and exchanges.
    """

    heads: int
    kv_bytes: float
    call_s: float
    heads_s: float
    kv_s: float

    @property
    def seconds(self) -> float:
        return self.call_s + self.heads_s + self.kv_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """The times of every device, and of the primary's network card, which is 0 while no worker holds heads."""

    devices: tuple[DeviceTime, ...]
    card_s: float

    @property
    def makespan_s(self) -> float:
        return max([self.card_s, *(device.seconds for device in self.devices)])

    @property
    def bottleneck(self) -> int | None:
        """The slowest device, or None if it is the network card or nothing runs."""
        seconds = [device.seconds for device in self.devices]
        slowest = max(range(len(seconds)), key=lambda i: seconds[i])
        return slowest if seconds[slowest] >= self.card_s and seconds[slowest] > 0 else None


def stage_times(stage: Stage, heads: IntArray, kv_bytes: FloatArray) -> StageTimes:
    """Return the times under a load: query heads and KV bytes read per layer on each device, shape [D]."""
    from hetis.solver.dispatch.tables import costs_of

    costs = costs_of(stage)
    parts = np.stack(
        [costs.call_s, costs.head_s * heads[:, None], costs.byte_s * kv_bytes[:, None]]
    )  # [3, D, K]  # fmt: skip
    slowest = parts.sum(axis=0).argmax(axis=1)
    devices = []
    for i, k in enumerate(slowest):
        call_s, heads_s, kv_s = (float(part) if heads[i] else 0.0 for part in parts[:, i, k])
        devices.append(
            DeviceTime(heads=int(heads[i]), kv_bytes=float(kv_bytes[i]), call_s=call_s, heads_s=heads_s, kv_s=kv_s)
        )
    on_workers = int(heads.sum()) - (int(heads[costs.primary]) if costs.primary >= 0 else 0)
    card_s = costs.nic_s + costs.nic_head_s * on_workers if costs.primary >= 0 and on_workers else 0.0
    return StageTimes(devices=tuple(devices), card_s=card_s)


def times_of(snapshot: StateSnapshot, *, arrived: bool = False) -> StageTimes:
    """Return the times of the running requests; with ``arrived``, moving head groups count at their targets."""
    groups = arrived_groups(snapshot) if arrived else snapshot.groups
    heads = snapshot.stage.heads
    kv_bytes = (snapshot.context_tokens @ groups).astype(np.float64) * heads.kv_bytes_per_token
    return stage_times(snapshot.stage, groups.sum(axis=0) * heads.queries_per_group, kv_bytes)


def arrived_groups(snapshot: StateSnapshot) -> IntArray:
    """Return the head groups of each request on each device after all moves in progress, shape [N, D]."""
    groups = snapshot.groups + snapshot.incoming()
    index = {name: j for j, name in enumerate(snapshot.ids)}
    for move in snapshot.moves:
        groups[index[move.request], move.source] -= move.groups
    return groups


def expected_blocks(snapshot: StateSnapshot) -> IntArray:
    """Return the KV blocks per layer on each device once its requests have all their expected tokens, shape [D]."""
    blocks: IntArray = snapshot.expected_blocks() @ (snapshot.groups + snapshot.incoming())
    return blocks
