"""The planner at a glance: what the status page shows and the gauges count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


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
    """

    epoch: int
    leader_since_s: float
    clusters: tuple[ClusterOverview, ...] = ()
    num_plans: Mapping[str, int]
    queued: int
    searching: int
    solver_processes: int


class OverviewSource(Protocol):
    """Who knows."""

    async def overview(self) -> Overview: ...

    async def cluster_details(self, name: str) -> Mapping[str, Any] | None:
        """A cluster with nodes, replicas and re-dispatches as JSON values; None: there is none of that name."""
        ...
