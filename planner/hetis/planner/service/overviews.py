"""The planner's state, gathered from store, fleet and solver pool for the status page."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.settings import redispatch_policy
from hetis.planner.jobs.pool import SolverPool
from hetis.planner.resources.clusters import Clusters
from hetis.planner.resources.nodes import Nodes
from hetis.planner.resources.shared import Hubs
from hetis.planner.resources.watches import RunningResources
from hetis.planner.service.overview import ClusterNow, ClusterOverview, KvHistories, Overview
from hetis.planner.store import Reader, Store
from hetis.v1 import cluster_pb2, plan_pb2, redispatch_pb2, view_pb2
from hetis.v1 import cluster_service_pb2 as pb

FRESH_S = 2.0  # how long a count is valid, however many scrape
WAIT_S = 0.5  # for a new count, before the last one is shown
DETAILS_S = 5.0  # for all details of one cluster
_PAGE = 500


@dataclass(slots=True, eq=False)
class Overviews:
    """Answers the status page by the same calls that the API makes.

    Attributes:
        epoch, leader_since_s: of the term; Unix seconds.
    """

    store: Store
    fleet: LiveFleet
    hubs: Hubs
    kv: KvHistories
    pool: SolverPool
    clusters: Clusters
    nodes: Nodes
    running: RunningResources
    epoch: int
    leader_since_s: float
    most_searches: int  # solver processes
    clock: Callable[[], float] = time.monotonic  # monotonic seconds
    _kept: _Kept = ((), {})
    _kept_s: float = field(init=False)
    _counting: asyncio.Future[_Kept] | None = None
    _counted_at_s: float | None = None  # or tried to

    def __post_init__(self) -> None:
        self._kept_s = self.clock()

    async def overview(self) -> Overview:
        await self._count()
        clusters, plans = self._kept
        return Overview(
            epoch=self.epoch,
            leader_since_s=self.leader_since_s,
            clusters=tuple(
                ClusterOverview(name=name, active_plan=plan, num_nodes=self._num_nodes(name, num_declared))
                for name, plan, num_declared in clusters
            ),
            num_plans=plans,
            counted_s_ago=self.clock() - self._kept_s,
            queued=self.pool.num_waiting,
            searching=self.pool.num_running,
            solver_processes=self.most_searches,
            searches_of=self.pool.searches_of(),
        )

    def clusters_now(self) -> Sequence[ClusterNow]:
        return [self._cluster_now(name) for name in sorted(self.fleet.cluster_names)]

    def _cluster_now(self, name: str) -> ClusterNow:
        moved = [event.value for event in self.hubs.cluster(name).newest()]
        return ClusterNow(
            name=name,
            nodes=self.fleet.nodes_of(name),
            replicas=self.fleet.replicas_of(name),
            redispatches=[message for message in moved if isinstance(message, redispatch_pb2.Redispatch)],
            kv=self.kv.of(name),
            high_water=redispatch_policy(self.fleet.policy_of(name)).high_water,
            now_s=time.time(),
        )

    async def cluster_details(self, name: str) -> Mapping[str, Any] | None:
        """Return the first 500 of each kind; ``has_more`` names the kinds of which there are more."""
        try:
            async with asyncio.timeout(DETAILS_S):
                return await self._details(name)
        except TimeoutError:
            raise ServiceError(
                Reason.ERROR_REASON_STORE_UNAVAILABLE, f"the store did not answer within {DETAILS_S:g} s"
            ) from None

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
        tokens = {
            "nodes": nodes.next_page_token,
            "replicas": replicas.next_page_token,
            "redispatches": moved.next_page_token,
        }
        return {
            "cluster": _json(cluster.cluster),
            "nodes": [_json(node) for node in nodes.nodes],
            "replicas": [_json(replica) for replica in replicas.replicas],
            "redispatches": [_json(redispatch) for redispatch in moved.redispatches],
            "has_more": [kind for kind, token in tokens.items() if token],
        }

    async def _count(self) -> None:
        """Refresh an outdated count. A store that does not answer is not waited for, and gets only one query."""
        if self._counting is None and self._counted_at_s is not None and self.clock() < self._counted_at_s + FRESH_S:
            return
        if self._counting is None:
            self._counting = asyncio.ensure_future(self.store.read(_read))
        done, _ = await asyncio.wait({self._counting}, timeout=WAIT_S)
        if not done:
            return
        counting, self._counting = self._counting, None
        if counting is None:  # another waiter has taken it
            return
        if counting.exception() is None:
            self._kept, self._kept_s = counting.result(), self.clock()
        self._counted_at_s = self.clock()

    def _num_nodes(self, cluster: str, num_declared: int) -> Mapping[str, int]:
        states = Counter(node.state for node in self.fleet.nodes_of(cluster).values())
        undeclared = states[cluster_pb2.NODE_STATE_UNDECLARED]
        never_seen = num_declared - (sum(states.values()) - undeclared)
        states[cluster_pb2.NODE_STATE_EXPECTED] += max(0, never_seen)
        return {
            cluster_pb2.NodeState.Name(state).removeprefix("NODE_STATE_"): count
            for state, count in sorted(states.items())
            if count
        }


_Kept = tuple[tuple[tuple[str, str, int], ...], Mapping[str, int]]  # clusters: name, active plan, nodes; plans by state


def _read(tx: Reader) -> _Kept:
    clusters = tuple((record.name, record.active_plan, record.body.num_nodes) for record in tx.clusters.all())
    plans = Counter(record.state for record in tx.plans.all())
    return clusters, {
        plan_pb2.PlanState.Name(state).removeprefix("PLAN_STATE_"): count for state, count in sorted(plans.items())
    }


def _json(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found
