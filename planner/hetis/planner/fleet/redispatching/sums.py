"""Bounds on a stage's deviation from the sums in a report, before its head map is requested.

The time of every device follows exactly from its sums, as attention costs are affine in heads and KV bytes. The time
of the best placement does not, as the head groups are not known. But no placement is faster than if heads and KV bytes
could be distributed freely and independently:

    min  z
    s.t. z >= c_i + a_i h_i + b_i g_i     every device i that takes head groups and is used
         sum_i h_i = H,  sum_i g_i = B

Each weighting of the two sums gives a lower bound. For shares u + v = 1, let w_i = max(u / (H a_i), v / (B b_i)) be
the part of the weighted sum that device i does per second; then at least the z with ``sum_i max(0, z - c_i) w_i = 1``
is needed. With devices by rising c_i it is the least of ``(1 + sum c w) / (sum w)`` over all prefixes. If a device has
several affine pieces, each of them gives a valid bound.

So a makespan within the deviation ratio of the bound is within that of the ideal, and no trigger is missed. The
converse may be a false alarm, since memory, whole head groups, the network card and the mix of lengths are ignored.
Then the head map is read once in vain, and `hetis.planner.fleet.redispatching.watched` stays quiet until something has
changed.

A report usually costs a few microseconds: with loads at least ``s`` times those of the last computed bound, the
bound is at least ``s`` times as high (s <= 1), and with loads at most ``s`` times those, at most ``s`` times as high
(s >= 1). It is computed again only if that does not decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hetis.planner.convert.stages import StageTerms
from hetis.solver.dispatch.problem import FloatArray
from hetis.solver.dispatch.tables import costs_of
from hetis.v1 import report_pb2

NEAR = 0.05  # share by which a deviation above its limit may be understated
_SHARES = np.linspace(0.0, 1.0, 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSums:
    """A stage in a report; devices in the order of the stage, unreported ones idle and ok.

    Attributes:
        heads: running query heads.
        kv_bytes: read by a layer in one step.
        used_ratio: share of KV blocks in use.
        status: whether it takes head groups; the worse of what the report and the planner know.
    """

    heads: tuple[int, ...]
    kv_bytes: tuple[float, ...]
    used_ratio: tuple[float, ...]
    status: tuple[int, ...]


def sums_of(
    load: report_pb2.StageLoad, terms: StageTerms, known: Sequence[report_pb2.DeviceStatus.ValueType]
) -> StageSums:
    """Return the sums of a report; ``known`` is the planner's status of each device."""
    num = len(terms.gpus)
    heads, kv_bytes, used, status = [0] * num, [0.0] * num, [0.0] * num, list(known)
    for device in load.devices:
        i = terms.index.get(device.device)
        if i is not None:
            heads[i], kv_bytes[i] = device.heads, device.kv_bytes
            total = device.total_blocks
            used[i] = device.used_blocks / total if total else 0.0
            status[i] = max(status[i], device.status)
    return StageSums(heads=tuple(heads), kv_bytes=tuple(kv_bytes), used_ratio=tuple(used), status=tuple(status))


class SumTest:
    """The makespan and the bound of one stage copy at the speeds of its terms."""

    def __init__(self, terms: StageTerms) -> None:
        costs = costs_of(terms.stage)
        self._head_s, self._byte_s, self._call_s = costs.head_s, costs.byte_s, costs.call_s
        self._rows = [
            list(zip(a, b, c, strict=True))
            for a, b, c in zip(costs.head_s.tolist(), costs.byte_s.tolist(), costs.call_s.tolist(), strict=True)
        ]
        self._primary, self._nic_head_s, self._nic_s = costs.primary, costs.nic_head_s, costs.nic_s
        self._bounded: tuple[int, float, tuple[int, ...], float] | None = None  # heads, bytes, statuses, bound

    def makespan_s(self, sums: StageSums) -> float:
        """Return seconds per layer and decode step of the slowest device or of the primary's network card."""
        slowest = 0.0
        for heads, kv_bytes, row in zip(sums.heads, sums.kv_bytes, self._rows, strict=True):
            if heads:
                for a, b, c in row:
                    seconds = a * heads + b * kv_bytes + c
                    if seconds > slowest:
                        slowest = seconds
        if self._primary >= 0:
            on_workers = sum(sums.heads) - sums.heads[self._primary]
            if on_workers:
                slowest = max(slowest, self._nic_s + self._nic_head_s * on_workers)
        return slowest

    def device_s(self, i: int, heads: int, kv_bytes: float) -> float:
        """Return seconds per layer and decode step of one device, 0 if it holds nothing."""
        return max(a * heads + b * kv_bytes + c for a, b, c in self._rows[i]) if heads else 0.0

    def deviation(self, sums: StageSums, limit: float) -> float:
        """Return how far the makespan is above the bound, as a share.

        A result up to ``limit`` only says that it is not above ``limit``; a higher one is right to within ``NEAR`` of
        the makespan.
        """
        makespan_s = self.makespan_s(sums)
        heads, kv_bytes = sum(sums.heads), sum(sums.kv_bytes)
        if makespan_s <= 0:
            return 0.0
        if self._bounded is not None:
            then_heads, then_bytes, status, bound_s = self._bounded
            if status == sums.status and (then_bytes or not kv_bytes):
                by_heads = heads / then_heads
                by_bytes = kv_bytes / then_bytes if then_bytes else by_heads
                least, most = bound_s * min(1.0, by_heads, by_bytes), bound_s * max(1.0, by_heads, by_bytes)
                if makespan_s <= least * (1 + limit):
                    return 0.0
                if makespan_s > most * (1 + limit) and most <= least * (1 + NEAR):
                    return makespan_s / most - 1.0
        bound_s = self.bound_s(sums)
        self._bounded = (heads, kv_bytes, sums.status, bound_s)
        return makespan_s / max(bound_s, 1e-12) - 1.0

    def bound_s(self, sums: StageSums) -> float:
        """Return a lower bound for any placement of these sums on devices that take head groups; 0 if none does."""
        takes = np.array([status <= report_pb2.DEVICE_STATUS_OK for status in sums.status])
        heads, kv_bytes = float(sum(sums.heads)), float(sum(sums.kv_bytes))
        if not takes.any() or heads <= 0:
            return 0.0
        a, b, c = self._head_s[takes].T, self._byte_s[takes].T, self._call_s[takes].T  # [K, D]
        order = np.argsort(c, axis=1)
        a, b, c = (np.take_along_axis(one, order, axis=1) for one in (a, b, c))
        rate = np.maximum(
            _per_second(_SHARES / heads, a), _per_second((1 - _SHARES) / kv_bytes, b) if kv_bytes else 0.0
        )  # [K, shares, D]
        with np.errstate(over="ignore", invalid="ignore"):
            levels = (1.0 + np.cumsum(c[:, None] * rate, axis=2)) / np.cumsum(rate, axis=2)
        lowest = np.where(np.isfinite(levels), levels, np.inf).min(axis=2)
        return float(np.max(np.where(np.isfinite(lowest), lowest, 0.0)))


def _per_second(shares: FloatArray, seconds: FloatArray) -> FloatArray:
    """Return shares [W] of the whole divided by seconds [K, D]; huge if a device takes no time for it."""
    return shares[:, None] / np.maximum(seconds, 1e-30)[:, None]
