"""The planner's state at a glance, from store, fleet and solver pool: the data of the status page and the gauges."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from hetis.planner.convert.names import word_of
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.fleet.settings import RedispatchPolicy, policy_from
from hetis.planner.fleet.views import LiveNode, LiveReplica
from hetis.planner.jobs.pool import SolverPool
from hetis.planner.resources.clusters import Clusters
from hetis.planner.resources.nodes import Nodes
from hetis.planner.resources.traffic import MeasuredTraffic, TrafficNow
from hetis.planner.resources.watches import RunningResources
from hetis.planner.store import Reader, Store
from hetis.planner.store.connection import forget
from hetis.v1 import cluster_pb2, plan_pb2, redispatch_pb2, replica_pb2, view_pb2
from hetis.v1 import cluster_service_pb2 as pb


def natural_order(device: str) -> list[tuple[bool, int, str]]:
    """Return a sort key by which ``p100-2/0`` comes before ``p100-10/0``."""
    parts = re.split(r"(\d+)", device)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOverview:
    """One cluster: numbers of nodes and replicas by state, such as ``READY`` and ``SERVING``."""

    name: str
    active_plan: str
    num_nodes: Mapping[str, int]
    num_replicas: Mapping[str, int] = field(default_factory=dict)
    desired: Mapping[str, int] = field(default_factory=dict)  # replicas that there should be, by shape
    activation: str = ""  # how far the active plan is, such as ``ACTIVATING``; empty if there is none, or unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """The planner's state. ``queued``, ``searching``: searches that wait for a solver process, or have one."""

    epoch: int  # the planner's leadership term
    leader_since_s: float  # Unix time at which the term began
    clusters: tuple[ClusterOverview, ...] = ()
    num_plans: Mapping[str, int]  # plans by state, such as ``SOLVING``
    queued: int
    searching: int
    solver_processes: int  # limit on solver processes
    # Searches by caller and state, ``running`` or ``queued``
    searches_of: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    counted_s_ago: float = 0.0  # age of the counts of clusters and plans, since the store may not answer
    leads: bool = True  # whether this planner leads
    leader: str = ""  # name of the leader, for display; empty if unknown
    lease_age_s: float = 0.0  # time since the last renewal; 0 if there is no lease
    store_answered_s_ago: float = 0.0  # time since the store's last successful transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterNow:
    """The state of a cluster in the planner's memory, without a query to the store."""

    name: str
    nodes: Mapping[str, LiveNode]  # by resource name
    replicas: Sequence[LiveReplica]  # all replicas that were not stopped, ordered by name
    redispatches: Sequence[redispatch_pb2.Redispatch]  # those of this leadership term, the latest change first
    kv: Mapping[str, float]  # share of each device's KV in use
    high_water: float | None  # share of a device's KV above which head groups should leave; None: the stage's own
    now_s: float  # Unix time of this snapshot
    traffic: TrafficNow = field(default_factory=TrafficNow)


FRESH_S = 2.0  # how long a count is valid, however many scrapes there are
WAIT_S = 0.5  # wait for a new count before the last one is shown
DETAILS_S = 5.0  # limit for reading all details of one cluster
_PAGE = 500


@dataclass(slots=True, eq=False)
class Overviews:
    """Answers the status page with the same calls as the API.

    Attributes:
        epoch, leader_since_s: the term's epoch, and the Unix time at which it began.
    """

    store: Store
    fleet: LiveFleet
    hubs: Hubs
    pool: SolverPool
    clusters: Clusters
    nodes: Nodes
    running: RunningResources
    epoch: int
    leader_since_s: float
    most_searches: int  # limit on solver processes
    traffic: MeasuredTraffic | None = None
    _counts: _Counts = field(default_factory=lambda: _Counts({}, {}))
    _counts_s: float = field(default_factory=time.monotonic)
    _counting: asyncio.Future[_Counts] | None = None
    _counted_at_s: float = -math.inf  # monotonic time of the last attempt to count

    async def overview(self) -> Overview:
        await self._count()
        counts = self._counts
        return Overview(
            epoch=self.epoch,
            leader_since_s=self.leader_since_s,
            clusters=tuple(self._cluster(name, one) for name, one in counts.clusters.items()),
            num_plans=counts.num_plans,
            counted_s_ago=time.monotonic() - self._counts_s,
            queued=self.pool.num_waiting,
            searching=self.pool.num_running,
            solver_processes=self.most_searches,
            searches_of=self.pool.searches_of(),
        )

    def clusters_now(self, only: str = "") -> Sequence[ClusterNow]:
        """Return all clusters, or the one that is named ``only`` if it is led."""
        names = [only] if only in self.fleet.cluster_names else [] if only else sorted(self.fleet.cluster_names)
        return [self._cluster_now(name) for name in names]

    def _cluster_now(self, name: str) -> ClusterNow:
        moved = [event.value for event in self.hubs.cluster(name).newest()]
        return ClusterNow(
            name=name,
            nodes=self.fleet.nodes_of(name),
            replicas=self.fleet.replicas_of(name),
            redispatches=[message for message in moved if isinstance(message, redispatch_pb2.Redispatch)],
            kv=dict(self.fleet.kv_in_use(name)),
            high_water=policy_from(RedispatchPolicy, self.fleet.policy_of(name)).high_water,
            now_s=time.time(),
            traffic=TrafficNow() if self.traffic is None else self.traffic.now(name),
        )

    async def cluster_details(self, name: str) -> Mapping[str, Any] | None:
        """Return the first 500 resources of each kind; ``has_more`` names the kinds of which there are more."""
        try:
            async with asyncio.timeout(DETAILS_S):
                return await self._details(name)
        except TimeoutError:
            message = f"the store did not answer within {DETAILS_S:g} s"
            raise ServiceError(Reason.ERROR_REASON_STORE_UNAVAILABLE, message) from None

    async def _details(self, name: str) -> Mapping[str, Any] | None:
        try:
            cluster = await self.clusters.get(pb.GetClusterRequest(name=name, view=view_pb2.VIEW_BASIC))
            nodes = await self.nodes.list(pb.ListNodesRequest(parent=name, page_size=_PAGE))
            replicas = await self.running.list_replicas(pb.ListReplicasRequest(parent=name, page_size=_PAGE))
            moved = await self.running.list_redispatches(pb.ListRedispatchesRequest(parent=name, page_size=_PAGE))
        except ServiceError as error:
            if error.reason in (Reason.ERROR_REASON_NOT_FOUND, Reason.ERROR_REASON_INVALID_FIELD):
                return None
            raise
        pages: Mapping[str, Any] = {"nodes": nodes, "replicas": replicas, "redispatches": moved}
        return {
            "cluster": _json(cluster.cluster),
            **{kind: [_json(one) for one in getattr(page, kind)] for kind, page in pages.items()},
            "has_more": [kind for kind, page in pages.items() if page.next_page_token],
        }

    async def _count(self) -> None:
        """Refresh an outdated count.

        A store that does not answer in time is not waited for, and only one query is sent to it.
        """
        if self._counting is None and time.monotonic() < self._counted_at_s + FRESH_S:
            return
        if self._counting is None:
            self._counting = asyncio.ensure_future(self.store.read(partial(_read, known=self._counts.clusters)))
            self._counting.add_done_callback(forget)  # nobody may ask again
        done, _ = await asyncio.wait({self._counting}, timeout=WAIT_S)
        if not done:
            return
        counting, self._counting = self._counting, None
        if counting is None:  # another waiter has taken the result
            return
        if counting.exception() is None:
            self._counts, self._counts_s = counting.result(), time.monotonic()
        self._counted_at_s = time.monotonic()

    def _cluster(self, name: str, counted: _CountedCluster) -> ClusterOverview:
        activation, replicas = self.fleet.activation_of(name), self.fleet.replicas_by_state(name)
        decision = None if self.traffic is None else self.traffic.decision_of(name)
        return ClusterOverview(
            name=name,
            active_plan=counted.active_plan,
            num_nodes=self._num_nodes(name, counted.num_nodes),
            num_replicas={word_of(replica_pb2.ReplicaState, state): num for state, num in sorted(replicas.items())},
            desired={} if decision is None else {one.shape: one.desired for one in decision.desired},
            activation="" if activation is None else word_of(plan_pb2.ActivationState, activation),
        )

    def _num_nodes(self, cluster: str, num_declared: int) -> Mapping[str, int]:
        states = self.fleet.num_by_state(cluster)
        undeclared = states[cluster_pb2.NODE_STATE_UNDECLARED]
        never_seen = num_declared - (sum(states.values()) - undeclared)
        states[cluster_pb2.NODE_STATE_EXPECTED] += max(0, never_seen)
        return {word_of(cluster_pb2.NodeState, state): count for state, count in sorted(states.items()) if count}


class _CountedCluster(NamedTuple):
    version: int  # of its record
    active_plan: str
    num_nodes: int


class _Counts(NamedTuple):
    clusters: Mapping[str, _CountedCluster]  # by name
    num_plans: Mapping[str, int]  # by state


def _read(tx: Reader, known: Mapping[str, _CountedCluster]) -> _Counts:
    """Count, and read only clusters that have changed since they were ``known``: their documents may be large."""

    def read(name: str) -> _CountedCluster:
        record = tx.clusters.require(name)
        return _CountedCluster(record.version, record.active_plan, record.body.num_nodes)

    clusters = {
        name: known[name] if name in known and known[name].version == version else read(name)
        for name, version in sorted(tx.clusters.versions().items())
    }
    num_plans = sorted(tx.plans.num_by_state().items())
    return _Counts(clusters, {word_of(plan_pb2.PlanState, state): count for state, count in num_plans})


def _json(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found
