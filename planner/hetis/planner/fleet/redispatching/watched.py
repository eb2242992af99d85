"""The loop's state of a replica between reports."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

from hetis.planner.convert.stages import Conditions, StageTerms, stage_from_proto
from hetis.planner.fleet.redispatching.planning import StagePlanner
from hetis.planner.fleet.settings import RedispatchPolicy
from hetis.planner.fleet.views import LiveReplica
from hetis.solver.dispatch.dispatch_problem import FloatArray
from hetis.solver.dispatch.loaded_stage import costs_of
from hetis.solver.redispatch.triggers import ALWAYS, CHANGE, MOST_CHANGE, Trigger, TriggerKind
from hetis.v1 import report_pb2, stage_pb2

LEAST_WAIT_S = 0.5  # between two looks at a replica whose redispatch_interval is shorter
MOST_DOUBLINGS = 6
NEAR = 0.05  # share by which a deviation above its limit may be understated
_SHARES = np.linspace(0.0, 1.0, 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSums:
    """A report's sums over each device of a stage, in the stage's order; unreported devices count as idle and OK."""

    heads: tuple[int, ...]  # running query heads on each device
    kv_bytes: tuple[float, ...]  # bytes that one layer reads in one step, on each device
    used_ratio: tuple[float, ...]  # share of each device's KV blocks in use
    status: tuple[int, ...]  # the worse of the reported status and the planner's, for each device


def sums_of(
    load: report_pb2.StageLoad, terms: StageTerms, known: Sequence[report_pb2.DeviceStatus.ValueType]
) -> StageSums:
    """Return the sums of a stage in a report; ``known`` is the planner's status of each device."""
    num = len(terms.gpus)
    heads, kv_bytes, used, status = [0] * num, [0.0] * num, [0.0] * num, list(known)
    for device in load.devices:
        i = terms.index.get(device.device)
        if i is not None:
            heads[i], kv_bytes[i] = device.heads, device.kv_bytes
            total = device.total_blocks
            used[i] = min(1.0, device.used_blocks / total) if total else 0.0
            status[i] = max(status[i], device.status)
    return StageSums(heads=tuple(heads), kv_bytes=tuple(kv_bytes), used_ratio=tuple(used), status=tuple(status))


class SumTest:
    """The makespan of one stage copy at the speeds of its terms, and a bound, both without its head map.

    The time of every device follows exactly from its sums, as attention costs are affine in heads and KV bytes. The
    time of the best placement does not, as the head groups are not known. But no placement is faster than if heads and
    KV bytes could be distributed freely and independently:

        min  z
        s.t. z >= c_i + a_i h_i + b_i g_i     every device i that takes head groups and is used
             sum_i h_i = H,  sum_i g_i = B

    Each weighting of the two sums gives a lower bound. For shares u + v = 1, let w_i = max(u / (H a_i), v / (B b_i)) be
    the part of the weighted sum that device i processes per second; then z must be at least the solution of
    ``sum_i max(0, z - c_i) w_i = 1``. With devices ordered by rising c_i, this is the minimum of
    ``(1 + sum c w) / (sum w)`` over all prefixes. If a device has several affine pieces, each of them gives a valid
    bound.

    So if the makespan is within the deviation ratio of the bound, it is within that ratio of the ideal, and no trigger
    is missed. The converse may be a false alarm, since memory, whole head groups, the network card and the mix of
    lengths are ignored. Then the head map is read once in vain, and `AlarmBackoff` stays quiet until something has
    changed.

    A report usually costs a few microseconds: if the loads are at least ``s`` times those of the last computed bound,
    the bound is at least ``s`` times as high (s <= 1), and if they are at most ``s`` times those, the bound is at most
    ``s`` times as high (s >= 1). It is computed again only if that does not decide.
    """

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
        """Return by what share the makespan exceeds the bound.

        A result up to ``limit`` means only that the deviation does not exceed ``limit``; a higher one is accurate
        to within ``NEAR`` of the makespan.
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
        """Return a lower bound for placing these sums on the devices that take head groups; 0 if there are none."""
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
    """Return shares [W] of the whole divided by seconds [K, D]; huge where a device takes no time."""
    return shares[:, None] / np.maximum(seconds, 1e-30)[:, None]


Place = tuple[int, int]  # stage and copy
_OK, _DRAINING, _LOST = report_pb2.DEVICE_STATUS_OK, report_pb2.DEVICE_STATUS_DRAINING, report_pb2.DEVICE_STATUS_LOST


class WatchedStage:
    """The state of one copy of one stage."""

    def __init__(self, model: stage_pb2.StageModel) -> None:
        self.model = model
        self.planner = StagePlanner()
        self.backoff = AlarmBackoff()
        self.terms = stage_from_proto(model)
        self.sums: StageSums | None = None  # sums in the last report; None: there was none
        self.alarms: tuple[Trigger, ...] = ()  # alarms raised by the last report
        self.changed: frozenset[str] = frozenset()  # devices whose changes the next look must consider
        self._slowness = Slowness()
        self._predicted = self._test = SumTest(self.terms)
        self._known: tuple[report_pb2.DeviceStatus.ValueType, ...] = (_OK,) * len(self.terms.gpus)

    def set_conditions(self, conditions: Conditions) -> bool:
        """Take over the planner's status of GPUs; return whether it changed."""
        known = self.terms.statuses(conditions)
        devices = self.terms.stage.devices
        changed = {name for name, now, then in zip(devices, known, self._known, strict=True) if now != then}
        for name in changed:
            self._slowness.forget(name)
        self._known = known
        self.changed |= changed
        if changed:
            self._rescale()
        return bool(changed)

    def report(self, load: report_pb2.StageLoad, policy: RedispatchPolicy) -> tuple[Trigger, ...]:
        """Return every trigger that a report's sums raise, usually none. Takes microseconds."""
        sums = self.sums = sums_of(load, self.terms, self._known)
        slower = set[str]()
        for device in load.devices:
            if device.observed_s > 0 and device.heads and (i := self.terms.index.get(device.device)) is not None:
                predicted_s = device.predicted_s or self._predicted.device_s(i, device.heads, device.kv_bytes)
                if self._slowness.observe(device.device, device.observed_s, predicted_s):
                    slower.add(device.device)
        if slower:
            self.changed |= slower
            self._rescale()
        self.alarms = tuple(self._alarms(sums, policy))
        return self.alarms

    def looked(self, *, seen: frozenset[str], num_finished: int, moved: bool) -> None:
        """Record a look at the head map, with the changes of the devices ``seen``."""
        self.changed -= seen
        if self.sums is not None:
            self.backoff.looked(self.sums, self.alarms, num_finished=num_finished, moved=moved)

    def _rescale(self) -> None:
        self.terms = stage_from_proto(self.model, slowness=self._slowness.factors)
        self._test = SumTest(self.terms)

    def _alarms(self, sums: StageSums, policy: RedispatchPolicy) -> list[Trigger]:
        found = list[Trigger]()
        if not any(sums.heads):
            return found
        deviation = self._test.deviation(sums, policy.deviation_ratio)
        if deviation > policy.deviation_ratio:
            limit = policy.deviation_ratio
            found.append(Trigger(kind=TriggerKind.DEVIATION, device=None, value=deviation, limit=limit))
        devices = self.terms.stage.devices
        for i, (name, used, status) in enumerate(zip(devices, sums.used_ratio, sums.status, strict=True)):
            mark = policy.high_water or self.terms.high_water[i]
            if status == _DRAINING:
                if sums.heads[i]:
                    groups = sums.heads[i] / self.terms.stage.heads.queries_per_group
                    found.append(Trigger(kind=TriggerKind.DRAINING, device=name, value=groups, limit=0.0))
            elif status != _LOST and used > mark:
                found.append(Trigger(kind=TriggerKind.HIGH_WATER, device=name, value=used, limit=mark))
            if name in self.changed and status != _DRAINING:
                kind = TriggerKind.LOST if status == _LOST else TriggerKind.CHANGED
                found.append(Trigger(kind=kind, device=name, value=0.0, limit=0.0))
        return found


class WatchedReplica:
    """The stages of a replica, and when it may be looked at again.

    Attributes:
        num_finished, num_running: those of the last report.
        is_wanted: whether an alarm is worth a look.
        is_looking: whether a look is in progress.
    """

    def __init__(self, models: Sequence[stage_pb2.StageModel]) -> None:
        self.stages = {(model.stage, model.copy): WatchedStage(model) for model in models}  # by stage and copy
        self.num_finished = self.num_running = 0
        self.not_before_s = 0.0  # earliest time of the next look
        self.is_wanted = self.is_looking = False
        self.under_way = ""  # the last re-dispatch that was sent, until it has ended; empty: none
        self._num_aborted = 0  # number of consecutive aborted re-dispatches
        self._models = models
        self._conditions: dict[str, report_pb2.DeviceStatus.ValueType] | None = None

    @property
    def can_be_looked_at(self) -> bool:
        """Whether a look is wanted and nothing but its time can delay it."""
        return self.is_wanted and not self.is_looking and not self.under_way

    def begin_look(self) -> None:
        self.is_looking = True

    def end_look(self) -> None:
        self.is_looking = False

    def want_look(self, wanted: bool = True) -> None:
        """Set whether there is something worth a look."""
        self.is_wanted = wanted

    def put_off(self, policy: RedispatchPolicy, *, now_s: float) -> None:
        """Delay the next look, twice as long for each consecutive aborted re-dispatch."""
        wait_s = max(LEAST_WAIT_S, policy.interval_s) * 2 ** min(self._num_aborted, MOST_DOUBLINGS)
        self.not_before_s = now_s + wait_s

    def begin(self, redispatch: str) -> None:
        """Record that a re-dispatch is being sent."""
        self.under_way = redispatch

    def end(self, redispatch: str, *, was_aborted: bool | None) -> bool:
        """Record that a re-dispatch ended or, with None, could not begin; return False if it was not the last one sent.

        Another look is then due, for moves that had to wait.
        """
        if self.under_way != redispatch:
            return False
        self.under_way, self.is_wanted = "", True
        if was_aborted is not None:
            self._num_aborted = self._num_aborted + 1 if was_aborted else 0
        return True

    def is_of(self, models: Sequence[stage_pb2.StageModel]) -> bool:
        """Return whether the replica still has the watched stages."""
        return models is self._models or list(models) == list(self._models)

    def set_conditions(self, view: LiveReplica) -> None:
        """Take over the planner's status of GPUs; a device that was lost or came back is worth a look."""
        if view.conditions == self._conditions:
            return
        first, self._conditions = self._conditions is None, dict(view.conditions)
        for stage in self.stages.values():
            changed = stage.set_conditions(view.conditions)
            self.is_wanted = self.is_wanted or (changed and not first)

    def report(self, report: report_pb2.ReplicaReport, policy: RedispatchPolicy) -> None:
        """Handle a report of the primary's node."""
        self.num_running, self.num_finished = report.num_running, report.num_finished
        for load in report.stages:
            stage = self.stages.get((load.stage, load.copy))
            if stage is None:
                continue
            alarms = stage.report(load, policy)
            if alarms and stage.sums is not None:
                self.is_wanted = self.is_wanted or stage.backoff.due(
                    stage.sums, alarms, num_running=self.num_running, num_finished=self.num_finished
                )

    def by_urgency(self) -> list[Place]:
        """Return the stages with an alarm: those with lost or draining devices first, then by deviation."""

        def urgency(place: Place) -> tuple[bool, float]:
            alarms = self.stages[place].alarms
            urgent = any(alarm.kind in (TriggerKind.LOST, TriggerKind.DRAINING) for alarm in alarms)
            return urgent, max((alarm.value for alarm in alarms), default=0.0)

        found = [place for place, stage in self.stages.items() if stage.alarms or stage.changed]
        return sorted(found, key=urgency, reverse=True)


class _Vain(NamedTuple):
    """The state of a stage at the last look that moved nothing."""

    sums: StageSums
    num_finished: int
    values: dict[tuple[TriggerKind, str | None], float]


class AlarmBackoff:
    """The backoff of `hetis.solver.redispatch.triggers.Watch`, based on sums instead of head maps.

    After a look that moved nothing, an alarm counts again if it is new, if its value has grown by the share ``CHANGE``,
    if a device's status changed, if that share of the KV was added, removed or moved, or if so many requests have
    finished that this share of the KV is replaced. Every further look that moves nothing doubles the share, up to
    ``MOST_CHANGE``; a look that moves something resets it.
    """

    def __init__(self) -> None:
        self._vain: _Vain | None = None
        self._change = CHANGE

    def due(self, sums: StageSums, alarms: tuple[Trigger, ...], *, num_running: int, num_finished: int) -> bool:
        """Return whether any of the alarms is worth a look."""
        vain = self._vain
        if not alarms or vain is None or vain.sums.status != sums.status:
            return bool(alarms)
        # A lower count of finished requests means that the replica's engine was restarted.
        replaced = num_finished < vain.num_finished or (
            num_finished - vain.num_finished >= self._change * max(1, num_running)
        )
        moved = sum(abs(now - then) for now, then in zip(sums.kv_bytes, vain.sums.kv_bytes, strict=True))
        if replaced or moved > self._change * (sum(sums.kv_bytes) + sum(vain.sums.kv_bytes)):
            return True
        return any(alarm.kind in ALWAYS or self._is_news(vain, alarm) for alarm in alarms)

    def looked(self, sums: StageSums, alarms: tuple[Trigger, ...], *, num_finished: int, moved: bool) -> None:
        """Record a look caused by these alarms, and whether it moved anything."""
        if moved:
            self._vain, self._change = None, CHANGE
            return
        values = {(alarm.kind, alarm.device): alarm.value for alarm in alarms}
        if self._vain is not None and self._vain.sums.status == sums.status:
            self._change = min(MOST_CHANGE, 2 * self._change)
            values = self._vain.values | values
        self._vain = _Vain(sums, num_finished, values)

    def _is_news(self, vain: _Vain, alarm: Trigger) -> bool:
        before = vain.values.get((alarm.kind, alarm.device))
        return before is None or alarm.value > before * (1 + self._change)


WINDOW = 7  # number of ratios of which the median is taken
STEP = 0.25  # share by which the median must differ from the factor to replace it
MOST = 16.0  # ratios are clipped to it and its inverse: beyond, the device is as good as lost, or the value wrong


class Slowness:
    """The ratio of measured to predicted time of each device of a stage, as a factor that seldom changes.

    The factor follows the median of the last seven ratios. Three outliers of seven change nothing, and the factor of a
    device that is twice as slow is exactly 2 after four reports; a mean would pass through all values in between, each
    of them a reason to move something. The factor changes when the median differs from it by more than a quarter, which
    ordinary noise does not cause. Until seven ratios are known, 1s stand in for the others: the profile is right unless
    four reports contradict it.
    """

    def __init__(self) -> None:
        self._ratios: dict[str, deque[float]] = {}
        self._factors: dict[str, float] = {}

    @property
    def factors(self) -> dict[str, float]:
        """Factors by device name; devices that are as fast as profiled are omitted."""
        return dict(self._factors)

    def observe(self, device: str, observed_s: float, predicted_s: float) -> bool:
        """Add one measurement (0: there is none); return whether the factor changed."""
        if observed_s <= 0 or predicted_s <= 0:
            return False
        ratios = self._ratios.get(device)
        if ratios is None:
            ratios = self._ratios[device] = deque([1.0] * WINDOW, WINDOW)
        ratios.append(min(MOST, max(1 / MOST, observed_s / predicted_s)))
        now, before = median(ratios), self._factors.get(device, 1.0)
        if 1 / (1 + STEP) <= now / before <= 1 + STEP:
            return False
        if 1 / (1 + STEP) <= now <= 1 + STEP:
            del self._factors[device]  # as profiled again, so exactly 1
        else:
            self._factors[device] = now
        return True

    def forget(self, device: str) -> None:
        """Forget a device that was lost or came back: earlier measurements do not apply to it."""
        self._ratios.pop(device, None)
        self._factors.pop(device, None)
