"""Views of the fleet: snapshots, not handles."""

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
    """A node as reported on its stream. Times are Unix seconds; None: never.

    Attributes:
        name: `clusters/{cluster}/nodes/{node}`.
        state: its presence.
        is_draining: whether it is to be emptied.
        devices: last report of each GPU.
        inventory: what its agent found; None: not known.
        agent_version: empty if no agent was connected since the planner started.
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
    """A replica as reported by its nodes.

    Attributes:
        name: `clusters/{cluster}/replicas/{replica}`.
        cluster: `clusters/{cluster}`.
        plan: the plan that it belongs to.
        plan_index: its index there.
        state: its state.
        generation: of its state at its primary, or of its last assignment if the primary has not reported yet.
        authority: who decides its head map.
        primary_node: id of the node.
        shape: its shape in the plan.
        model: a ModelSpec document; None: not looked up yet.
        stages: for its dispatcher; empty: not looked up yet, or a prefill replica.
        conditions: by GPU, `node/index`; those not listed are OK.
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
    """The hubs of this leadership term, through which watchers get changes."""

    @property
    def plans(self) -> Hub[str, plan_pb2.Plan]: ...

    def cluster(self, name: str) -> Hub[tuple[str, str], Any]:
        """Return the hub of ``clusters/{cluster}``; to be requested each time."""


class CallerIdentity(Protocol):
    """The identity of a stream's caller."""

    def require_node(self, node: str) -> None:
        """Check that the caller may speak for this node.

        Raises:
            ServiceError: WRONG_NODE.
        """


class FleetObserver(Protocol):
    """An observer that is called in the fleet's loop and must return at once."""

    def replica_reported(self, replica: str, report: report_pb2.ReplicaReport) -> None:
        """Note a report from one of the replica's nodes, the primary's or another."""

    def replica_changed(self, replica: str) -> None:
        """Note a change of a replica's state, generation or conditions, or that it is gone."""

    def redispatch_ended(self, redispatch: redispatch_pb2.Redispatch) -> None:
        """Note that a re-dispatch is final, durably."""

    def capacity_changed(self, cluster: str) -> None:
        """Note that a node was lost, is back, drains, or joined."""


class Clock(Protocol):
    """A source of time."""

    def monotonic(self) -> float:
        """Return monotonic seconds."""

    def time(self) -> float:
        """Return Unix seconds."""
