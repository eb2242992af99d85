"""The planner at a glance: what the status page shows and the gauges count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hetis.planner.fleet.views import LiveReplica
from hetis.planner.resources.live import NodeNow
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
    """All of it.

    Attributes:
        epoch: the planner's leadership term.
        leader_since_s: when it began, Unix seconds.
        num_plans: plans by state, such as ``SOLVING``.
        queued, searching: searches that wait for a solver process, and that have one.
        solver_processes: how many there may be.
        searches_of: searches by caller and state, ``running`` or ``queued``.
        counted_s_ago: how old the counts of clusters and plans are, where the store does not answer.
        leads: whether this planner does.
        leader: who does, for people; empty: not known.
        lease_age_s: since the last renewal; 0 where there is no lease.
        store_answered_s_ago: since the store last did what it was asked to.
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
    """A cluster as the planner has it in memory: the store is not asked.

    Attributes:
        nodes: by resource name.
        replicas: all that were not stopped, by name.
        redispatches: of this leadership term, the latest change first.
        kv: how full the devices were in the last minutes.
        high_water: share of a device's KV above which head groups leave; None: as each stage says.
        now_s: when this was, Unix seconds.
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
        """Return the clusters that this planner leads, by name; none of a standby."""
        ...

    async def overview(self) -> Overview:
        """Return the overview at once; where the store does not answer, with what was known before."""
        ...

    async def cluster_details(self, name: str) -> Mapping[str, Any] | None:
        """A cluster with nodes, replicas and re-dispatches as JSON values; None: there is none of that name.

        Raises:
            ServiceError: STORE_UNAVAILABLE.
        """
        ...
