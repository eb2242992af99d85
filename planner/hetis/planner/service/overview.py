"""The planner at a glance: the data of the status page and the gauges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hetis.planner.fleet.views import LiveReplica
from hetis.planner.resources.shared import NodeNow
from hetis.planner.service.kv_history import KvHistory
from hetis.v1 import redispatch_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOverview:
    """One cluster. ``num_nodes`` has a count per node state, such as ``READY``."""

    name: str
    active_plan: str
    num_nodes: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """The planner's state.

    Attributes:
        epoch: the planner's leadership term.
        leader_since_s: when it began, Unix seconds.
        num_plans: plans by state, such as ``SOLVING``.
        queued, searching: searches that wait for a solver process, and that have one.
        solver_processes: the most there may be.
        searches_of: searches by caller and state, ``running`` or ``queued``.
        counted_s_ago: how old the counts of clusters and plans are, as the store may not answer.
        leads: whether this planner does.
        leader: who does, for people; empty if unknown.
        lease_age_s: since the last renewal; 0 if there is no lease.
        store_answered_s_ago: since the store's last successful transaction.
    """

    epoch: int
    leader_since_s: float
    clusters: tuple[ClusterOverview, ...] = ()
    num_plans: Mapping[str, int]
    queued: int
    searching: int
    solver_processes: int
    searches_of: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    counted_s_ago: float = 0.0
    leads: bool = True
    leader: str = ""
    lease_age_s: float = 0.0
    store_answered_s_ago: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterNow:
    """A cluster as the planner has it in memory, without a query to the store.

    Attributes:
        nodes: by resource name.
        replicas: all that were not stopped, by name.
        redispatches: of this leadership term, the latest change first.
        kv: recent history of the devices' KV.
        high_water: share of a device's KV above which head groups leave; None: the stage's own.
        now_s: the time of this snapshot, Unix seconds.
    """

    name: str
    nodes: Mapping[str, NodeNow]
    replicas: Sequence[LiveReplica]
    redispatches: Sequence[redispatch_pb2.Redispatch]
    kv: KvHistory
    high_water: float | None
    now_s: float


class OverviewSource(Protocol):
    """Source of the overview."""

    def clusters_now(self) -> Sequence[ClusterNow]:
        """Return the clusters that this planner leads, by name; none for a standby."""
        ...

    async def overview(self) -> Overview:
        """Return the overview at once; if the store does not answer, with older counts."""
        ...

    async def cluster_details(self, name: str) -> Mapping[str, Any] | None:
        """Return a cluster with nodes, replicas and re-dispatches as JSON values, or None if it does not exist.

        Raises:
            ServiceError: STORE_UNAVAILABLE.
        """
        ...
