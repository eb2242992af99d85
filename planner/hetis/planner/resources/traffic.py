"""Measured traffic: what agents report is folded into windows every few seconds, stored when complete, and shown."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from hetis.planner.convert import names
from hetis.planner.convert.names import cluster_of
from hetis.planner.convert.plans import role_of
from hetis.planner.convert.traffic import TrafficWindow, traffic_from_proto
from hetis.planner.failures import ServiceError
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.traffic import TrafficWindows, is_kept, of_role
from hetis.planner.fleet.views import Clock, FleetObserver
from hetis.planner.resources.checks import check
from hetis.planner.resources.plan_documents import PlanDocuments
from hetis.planner.store import Store, TrafficRecord, Transaction
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Role
from hetis.v1 import cluster_service_pb2 as pb
from hetis.v1 import report_pb2, traffic_pb2

FOLD_S = 5.0
_log = logging.getLogger("hetis.planner.traffic")


@dataclass(frozen=True, slots=True)
class _Source:
    """Whose requests a replica serves: the model of its plan, and its role."""

    model: str
    role: Role


@dataclass(slots=True, eq=False)
class MeasuredTraffic(FleetObserver):
    """The traffic of all clusters. Run `run` once."""

    _store: Store
    _fleet: LiveFleet
    _documents: PlanDocuments
    _clock: Clock
    _latest: dict[str, tuple[float, traffic_pb2.Traffic]] = field(default_factory=dict)
    _sources: dict[str, _Source] = field(default_factory=dict)
    _clusters: dict[str, TrafficWindows] = field(default_factory=dict)
    _unsaved: dict[str, TrafficRecord] = field(default_factory=dict)

    # --- FleetObserver

    def replica_reported(self, replica: str, report: report_pb2.ReplicaReport) -> None:
        if report.is_primary and report.HasField("traffic"):
            self._latest[replica] = self._clock.time(), report.traffic

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
        for number, (replica, (time_s, message)) in enumerate(latest.items()):
            source = await self._source_of(replica)
            if source is None:
                continue
            try:
                reading = of_role(traffic_from_proto(message), source.role)
            except InvalidProblemError as error:
                _log.warning("the traffic that %s reports is left out: %s", replica, error)
                continue
            (await self.windows_of(cluster_of(replica))).take(replica, source.model, reading, time_s)
            if number % 20 == 19:
                await asyncio.sleep(0)  # a thousand replicas take a fifth of a second
        await self._save(self._clock.time())

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
                record = await self._store.read(lambda reader: reader.plans.get(live.plan))
            if live is None or record is None:
                return None
            model = (await self._documents.of(record)).problem.model.name
            self._sources[replica] = _Source(model, role_of(live.shape))
        return self._sources[replica]

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
        await self._store.read(lambda reader: reader.clusters.require(cluster))
        windows = (await self.windows_of(cluster)).windows()
        found = traffic_pb2.ClusterTraffic(name=request.name, windows=(one.to_proto() for one in windows))
        return pb.GetClusterTrafficResponse(cluster_traffic=found)

    def now(self, cluster: str) -> list[TrafficWindow]:
        """Return the windows in memory, for display."""
        return self._clusters[cluster].windows() if cluster in self._clusters else []


def _name(cluster: str, window: TrafficWindow) -> str:
    return f"{cluster}/traffic/{window.span_s}/{window.start_s}/{window.model}"


def _record(cluster: str, window: TrafficWindow) -> TrafficRecord:
    return TrafficRecord(name=_name(cluster, window), cluster=cluster, body=window.to_proto())
