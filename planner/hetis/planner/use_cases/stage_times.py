"""How long every device of a stage takes, and on what: the numbers that reports and explanations show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis.solver.dispatch.problem import FloatArray, IntArray, Stage
from hetis.solver.dispatch.snapshot import StateSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTime:
    """Seconds per layer and decode step of a device, on the affine piece that counts; all 0 when it holds no heads.

    ``heads_s`` are for query heads, their exchange with the primary included, ``kv_s`` for reading KV, ``call_s`` for
    what every call and exchange takes.
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
    """What every device takes, and the primary's network card, which takes 0 while no worker holds heads."""

    devices: tuple[DeviceTime, ...]
    card_s: float

    @property
    def makespan_s(self) -> float:
        return max([self.card_s, *(device.seconds for device in self.devices)])

    @property
    def bottleneck(self) -> int | None:
        """The slowest device; None: the network card, or nothing runs."""
        seconds = [device.seconds for device in self.devices]
        slowest = max(range(len(seconds)), key=lambda i: seconds[i])
        return slowest if seconds[slowest] >= self.card_s and seconds[slowest] > 0 else None


def stage_times(stage: Stage, heads: IntArray, kv_bytes: FloatArray) -> StageTimes:
    """Times under a load, running query heads and KV bytes read per layer on each device, shape [D]."""
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
    """Times of what runs; with ``arrived`` as if the head groups under way were where they go."""
    groups = arrived_groups(snapshot) if arrived else snapshot.groups
    heads = snapshot.stage.heads
    kv_bytes = (snapshot.context_tokens @ groups).astype(np.float64) * heads.kv_bytes_per_token
    return stage_times(snapshot.stage, groups.sum(axis=0) * heads.queries_per_group, kv_bytes)


def arrived_groups(snapshot: StateSnapshot) -> IntArray:
    """Head groups of each request on each device once all moves under way are done, shape [N, D]."""
    groups = snapshot.groups + snapshot.incoming()
    index = {name: j for j, name in enumerate(snapshot.ids)}
    for move in snapshot.moves:
        groups[index[move.request], move.source] -= move.groups
    return groups


def expected_blocks(snapshot: StateSnapshot) -> IntArray:
    """KV blocks per layer on each device once its requests have all the tokens expected of them, shape [D]."""
    blocks: IntArray = snapshot.expected_blocks() @ (snapshot.groups + snapshot.incoming())
    return blocks
