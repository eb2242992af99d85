"""Measured traffic: what agents report is folded into windows every few seconds, stored when complete, and shown."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from hetis.planner.convert import names
from hetis.planner.convert.names import cluster_of
from hetis.planner.convert.plans import replica_from_proto, role_of
from hetis.planner.convert.traffic import MINUTE_S, TrafficWindow, traffic_from_proto
from hetis.planner.failures import ServiceError
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.stored_plans import AnsweredPlan, StoredPlans
from hetis.planner.fleet.traffic import TrafficWindows, is_kept, of_role
from hetis.planner.fleet.views import Clock, FleetObserver
from hetis.planner.loop.speeds import SLOW, ExpectedTimes, MeasuredReplica, Speed, SpeedSample, speeds
from hetis.planner.resources.checks import check
from hetis.planner.store import Reader, Store, TrafficRecord, Transaction
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Role
from hetis.solver.traffic import Histogram, TrafficSketch
from hetis.v1 import cluster_service_pb2 as pb
from hetis.v1 import report_pb2, traffic_pb2

FOLD_S = 5.0
RECENT_MINUTES = 15  # of speeds and attainment
RECENT_S = 60.0 * RECENT_MINUTES
LEAST_REQUESTS = 100  # that ended, from which lengths are taken as measured
_log = logging.getLogger("hetis.planner.traffic")


@dataclass(slots=True)
class _Source:
    """A replica that reports: the model that it serves, its role, and its last minutes by their number.

    A minute has seconds between tokens, their number, the requests that ran, and how often they were looked at.
    """

    model: str
    role: Role
    minutes: dict[int, tuple[float, float, float, int]] = field(default_factory=dict)

    def add(self, minute: int, tpot_s: Histogram, running: int) -> None:
        seconds, tokens, ran, looks = self.minutes.get(minute, (0.0, 0.0, 0.0, 0))
        self.minutes[minute] = seconds + tpot_s.total, tokens + tpot_s.count, ran + running, looks + 1
        while len(self.minutes) > RECENT_MINUTES:
            del self.minutes[next(iter(self.minutes))]  # the clock may have been set back

    def samples(self, now_s: float) -> list[SpeedSample]:
        return [
            SpeedSample(tpot_s=seconds / tokens, tokens=tokens, running=ran / looks)
            for minute, (seconds, tokens, ran, looks) in self.minutes.items()
            if tokens and now_s / MINUTE_S - RECENT_MINUTES <= minute < now_s // MINUTE_S
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficNow:
    """What was measured in a cluster."""

    windows: Sequence[TrafficWindow] = ()
    speeds: Sequence[Speed] = ()
    decision: traffic_pb2.TrafficDecision | None = None


@dataclass(slots=True, eq=False)
class MeasuredTraffic(FleetObserver):
    """The traffic of all clusters. Run `run` once."""

    _store: Store
    _fleet: LiveFleet
    _stored: StoredPlans
    _clock: Clock
    _latest: dict[str, tuple[float, report_pb2.ReplicaReport]] = field(default_factory=dict)
    _sources: dict[str, _Source] = field(default_factory=dict)
    _clusters: dict[str, TrafficWindows] = field(default_factory=dict)
    _unsaved: dict[str, TrafficRecord] = field(default_factory=dict)
    _speeds: dict[str, list[Speed]] = field(default_factory=dict)
    _compared_s: float = 0.0
    decision_of: Callable[[str], traffic_pb2.TrafficDecision | None] = lambda cluster: None  # set by whoever decides

    # --- FleetObserver

    def replica_reported(self, replica: str, report: report_pb2.ReplicaReport) -> None:
        if report.is_primary and report.HasField("traffic"):
            self._latest[replica] = self._clock.time(), report

    def replica_changed(self, replica: str) -> None:
        if self._fleet.replica_view(replica) is None:
            self._sources.pop(replica, None)

    # --- due work

    async def run(self) -> None:
        while True:
            try:
                await self.step()
            except ServiceError as error:
                _log.warning("measured traffic is not stored: %s; trying again", error)
            except Exception:
                _log.exception("measured traffic could not be taken in")  # must not end the planner
            await asyncio.sleep(FOLD_S)

    async def step(self) -> None:
        """Take in the newest reports, and store the windows that they complete."""
        latest, self._latest = self._latest, {}
        for number, (replica, (time_s, report)) in enumerate(latest.items()):
            source = await self._source_of(replica)
            if source is None:
                continue
            try:
                reading = of_role(traffic_from_proto(report.traffic), source.role)
            except InvalidProblemError as error:
                _log.warning("the traffic that %s reports is left out: %s", replica, error)
                continue
            windows = await self.windows_of(cluster_of(replica))
            if (added := windows.take(replica, source.model, reading, time_s)) is not None:
                source.add(int(time_s // MINUTE_S), added.tpot_s, report.num_running)
            if number % 20 == 19:
                await asyncio.sleep(0)  # a thousand replicas take a fifth of a second
        now_s = self._clock.time()
        await self._save(now_s)
        if abs(now_s - self._compared_s) >= MINUTE_S:
            self._compared_s = now_s
            self._speeds = {name: await self._compare(name, now_s) for name in self._fleet.cluster_names}

    async def windows_of(self, cluster: str) -> TrafficWindows:
        """Return a cluster's windows, which are read from the store once."""
        if cluster not in self._clusters:
            records = await self._store.read(lambda reader: reader.traffic.all(cluster=cluster))
            now_s = self._clock.time()
            windows = (TrafficWindow.from_proto(record.body) for record in records)
            self._clusters.setdefault(cluster, TrafficWindows(one for one in windows if is_kept(one, now_s)))
        return self._clusters[cluster]

    async def _source_of(self, replica: str) -> _Source | None:
        """Return what a replica serves; None if it is gone, or its plan cannot be read."""
        if replica not in self._sources:
            live = self._fleet.replica_view(replica)
            record = None
            if live is not None and live.plan:
                record = await self._store.get(Reader.plans, live.plan)
            if live is None or record is None:
                return None
            model = (await self._stored.of(record)).problem.model.name
            self._sources[replica] = _Source(model, role_of(live.shape))
        return self._sources[replica]

    async def _compare(self, cluster: str, now_s: float) -> list[Speed]:
        """Compare the replicas of the plan in force with their profiles."""
        measured = defaultdict[str, list[MeasuredReplica]](list)  # by plan
        for live in self._fleet.replicas_of(cluster):
            source = self._sources.get(live.name)
            if source is not None and (samples := source.samples(now_s)):
                slow = tuple(_slow_devices(live.report)) if live.report is not None else ()
                shape = replica_from_proto(live.shape)
                one = MeasuredReplica(name=live.name, plan=shape, samples=samples, slow_devices=slow)
                measured[live.plan].append(one)
        # Of a cluster in which nothing was measured, and there may be hundreds, the plan is not even read.
        plan = await self.plan_in_force(cluster) if measured else None
        if plan is None or not (replicas := measured[plan.record.name]):
            return []
        recent = self._since(cluster, plan.problem.model.name, now_s - RECENT_S)

        def compared() -> list[Speed]:
            many = min(recent.prompt_tokens.count, recent.output_tokens.count) >= LEAST_REQUESTS
            return speeds(replicas, ExpectedTimes(plan.problem, recent.workload("measured") if many else None))

        return await run_in_thread_gc_paused(compared)

    async def plan_in_force(self, cluster: str) -> AnsweredPlan | None:
        """Return the plan that is in force or being activated."""
        return await self._stored.in_force(cluster)

    def _since(self, cluster: str, model: str, since_s: float) -> TrafficSketch:
        windows = self._clusters[cluster].windows() if cluster in self._clusters else []
        recent = [one for one in windows if one.model == model and one.span_s == MINUTE_S and one.start_s >= since_s]
        return sum((one.traffic for one in recent), TrafficSketch())

    async def _save(self, now_s: float) -> None:
        gone, known = list[str](), set(self._fleet.cluster_names)
        self._clusters = {name: windows for name, windows in self._clusters.items() if name in known}
        for cluster, windows in self._clusters.items():
            self._unsaved |= {one.name: one for one in (_record(cluster, done) for done in windows.complete(now_s))}
            gone += (_name(cluster, one) for one in windows.drop(now_s))
        records = [one for one in self._unsaved.values() if one.cluster in known and one.name not in set(gone)]
        if not records and not gone:
            return

        def save(tx: Transaction) -> None:
            tx.traffic.delete_all(name=[*gone, *(one.name for one in records)])
            for one in records:
                if tx.clusters.get(one.cluster) is not None:
                    tx.traffic.insert(one)

        await self._store.write(save)
        self._unsaved.clear()

    # --- calls

    async def get(self, request: pb.GetClusterTrafficRequest) -> pb.GetClusterTrafficResponse:
        check(request, name=names.TRAFFIC)
        cluster = cluster_of(request.name)
        await self._store.require(Reader.clusters, cluster)
        await self.windows_of(cluster)
        now, plan = self.now(cluster), await self.plan_in_force(cluster)
        shown = traffic_pb2.ClusterTraffic(
            name=request.name,
            windows=(one.to_proto() for one in now.windows),
            speeds=map(_speed_to_proto, now.speeds),
        )
        if plan is not None and (found := self.attainment(cluster, plan, self._clock.time() - RECENT_S)) is not None:
            shown.attainment = found[0]
        if (decision := self.decision_of(cluster)) is not None:
            shown.decision.CopyFrom(decision)
        return pb.GetClusterTrafficResponse(cluster_traffic=shown)

    def attainment(self, cluster: str, plan: AnsweredPlan, since_s: float) -> tuple[float, TrafficSketch] | None:
        """Return the share of first tokens within the plan's limit, and the traffic, since a time within minutes; None
        if there is no limit, or nothing was measured.
        """
        recent, limit_s = self._since(cluster, plan.problem.model.name, since_s), plan.plan.objective.ttft_limit_s
        if limit_s is None or not recent.ttft_s.count:
            return None
        return recent.ttft_s.share_within(limit_s), recent

    def now(self, cluster: str) -> TrafficNow:
        """Return what is in memory, for display."""
        windows = self._clusters[cluster].windows() if cluster in self._clusters else []
        return TrafficNow(windows=windows, speeds=self._speeds.get(cluster, ()), decision=self.decision_of(cluster))


def _slow_devices(report: report_pb2.ReplicaReport) -> Iterator[str]:
    """Yield the devices that an engine measures to be slower than planned."""
    for stage in report.stages:
        for load in stage.devices:
            if load.predicted_s > 0 and load.observed_s > SLOW * load.predicted_s:
                yield load.device


def _speed_to_proto(speed: Speed) -> traffic_pb2.MeasuredSpeed:
    return traffic_pb2.MeasuredSpeed(
        replica=speed.replica,
        gpu_types=speed.gpus,
        tpot_s=speed.tpot_s,
        expected_tpot_s=speed.expected_s,
        correction_ratio=speed.correction,
        error_ratio=speed.error if math.isfinite(speed.error) else 0.0,
        is_slow=speed.is_slow,
        devices=speed.devices,
    )


def _name(cluster: str, window: TrafficWindow) -> str:
    return f"{cluster}/traffic/{window.span_s}/{window.start_s}/{window.model}"


def _record(cluster: str, window: TrafficWindow) -> TrafficRecord:
    return TrafficRecord(name=_name(cluster, window), cluster=cluster, body=window.to_proto())
