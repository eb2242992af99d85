"""What the fleet shows of itself: moments, not handles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hetis.planner.watching import Hub
from hetis.v1 import (
    agent_service_pb2,
    cluster_pb2,
    document_pb2,
    inventory_pb2,
    plan_pb2,
    redispatch_pb2,
    replica_pb2,
    report_pb2,
    stage_pb2,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveNode:
    """A node as its stream tells. Times are Unix seconds; None: never.

    Attributes:
        name: `clusters/{cluster}/nodes/{node}`.
        state: whether it can be relied on.
        is_draining: it is to be emptied.
        devices: last report of each GPU.
        inventory: what its agent found; None: not known.
        agent_version: empty: no agent was connected since the planner started.
        capabilities: of its agent.
    """

    name: str
    state: cluster_pb2.NodeState.ValueType
    is_draining: bool
    devices: tuple[report_pb2.DeviceReport, ...]
    inventory: inventory_pb2.NodeInventory | None
    agent_version: str
    capabilities: frozenset[agent_service_pb2.AgentCapability.ValueType]
    connect_time_s: float | None
    heard_time_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveReplica:
    """A replica as its nodes tell.

    Attributes:
        name: `clusters/{cluster}/replicas/{replica}`.
        cluster: `clusters/{cluster}`.
        plan: that it belongs to.
        plan_index: its index there.
        state: its state.
        generation: of its state at its primary, or of its last assignment where the primary said nothing yet.
        authority: who decides its head map.
        primary_node: id of the node.
        shape: what the plan says of it.
        model: a ModelSpec document; None: not looked up yet.
        stages: for its dispatcher; empty: not looked up yet, or a prefill replica.
        conditions: by GPU, `node/index`; those that are not here are OK.
        report: the last of its primary; None: none yet.
        report_time_s: when that came, Unix seconds; None: never.
        redispatch: name of the one under way; empty: none.
    """

    name: str
    cluster: str
    plan: str
    plan_index: int
    state: replica_pb2.ReplicaState.ValueType
    generation: int
    authority: replica_pb2.HeadMapAuthority.ValueType
    primary_node: str
    shape: replica_pb2.ReplicaPlan
    model: document_pb2.Document | None
    stages: Sequence[stage_pb2.StageModel]
    conditions: Mapping[str, report_pb2.DeviceStatus.ValueType]
    report: report_pb2.ReplicaReport | None
    report_time_s: float | None
    redispatch: str


class Publishing(Protocol):
    """Hubs where watchers hear of changes: those of this leadership term."""

    @property
    def plans(self) -> Hub[str, plan_pb2.Plan]: ...

    def cluster(self, name: str) -> Hub[tuple[str, str], Any]:
        """Return the hub of ``clusters/{cluster}``; to be asked for each time."""


class CallerIdentity(Protocol):
    """The identity of whoever opens a stream."""

    def require_node(self, node: str) -> None:
        """
        Raises:
            ServiceError: WRONG_NODE: it may not speak for this node.
        """


class FleetObserver(Protocol):
    """Listener that is told in the fleet's loop, and must return at once."""

    def replica_reported(self, replica: str, report: report_pb2.ReplicaReport) -> None:
        """A report came of a node of the replica, the primary's or another."""

    def replica_changed(self, replica: str) -> None:
        """Its state, generation or conditions; or it is gone."""

    def redispatch_ended(self, redispatch: redispatch_pb2.Redispatch) -> None:
        """Its state is final, durably."""

    def capacity_changed(self, cluster: str) -> None:
        """A node was lost, is back, drains, or joined."""


class Clock(Protocol):
    """Time, from outside."""

    def monotonic(self) -> float:
        """Seconds that only grow."""

    def time(self) -> float:
        """Unix seconds."""
