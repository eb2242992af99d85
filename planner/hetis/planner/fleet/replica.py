"""One replica of a running cluster: its record, its GPUs, its plan's contents, and the assignments that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hetis.planner.convert.clusters import basic_replica
from hetis.planner.fleet.activation import Standing, State
from hetis.planner.fleet.agents.deltas import WantedAssignment
from hetis.planner.store import ReplicaRecord
from hetis.solver.cluster import node_of
from hetis.v1 import document_pb2, replica_pb2, report_pb2, stage_pb2


def dense_devices_of(shape: replica_pb2.ReplicaPlan) -> list[str]:
    """Return the GPUs without which the replica cannot serve, as `node/index`, the primary's first."""
    return [device for stage in shape.stages for device in stage.devices]


def devices_of(shape: replica_pb2.ReplicaPlan) -> list[str]:
    """Return all GPUs of the replica, as `node/index`: those of its stages, then its attention workers."""
    workers = dict.fromkeys(device for pool in shape.attention_workers for device in pool.devices)  # shared ones once
    return [*dense_devices_of(shape), *workers]


def nodes_of(shape: replica_pb2.ReplicaPlan) -> list[str]:
    """Return the ids of the nodes where the replica has GPUs, the primary's first."""
    return list(dict.fromkeys(map(node_of, devices_of(shape))))


# The goal of the last assignment, if an earlier planner made it. Repeating LOAD does no harm to a node that was already
# ordered to serve: once all nodes have loaded, all are ordered to serve again.
_GOAL_OF = {
    replica_pb2.REPLICA_STATE_STARTING: replica_pb2.ASSIGNMENT_GOAL_LOAD,
    replica_pb2.REPLICA_STATE_SERVING: replica_pb2.ASSIGNMENT_GOAL_SERVE,
    replica_pb2.REPLICA_STATE_DEGRADED: replica_pb2.ASSIGNMENT_GOAL_SERVE,
    replica_pb2.REPLICA_STATE_FAILED: replica_pb2.ASSIGNMENT_GOAL_SERVE,
    replica_pb2.REPLICA_STATE_DRAINING: replica_pb2.ASSIGNMENT_GOAL_DRAIN,
    replica_pb2.REPLICA_STATE_STOPPED: replica_pb2.ASSIGNMENT_GOAL_DRAIN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The data in a plan's document about a replica besides its shape."""

    model: document_pb2.Document  # a ModelSpec document
    # Models for the primary's dispatcher, one per copy of each stage; none for a prefill replica
    stages: tuple[stage_pb2.StageModel, ...]
    kv_partners: Sequence[replica_pb2.KvPartner] = ()  # kinds of replicas with which it exchanges KV
    gpu_kinds: Sequence[replica_pb2.GpuKind] = ()  # kinds of its GPUs and of its partners'


class Replica:
    """The state of one replica.

    Attributes:
        report, report_time_s: the last report of its primary, and its Unix time.
    """

    def __init__(self, record: ReplicaRecord) -> None:
        shape = record.body.shape
        self.record = record  # as last stored
        self.basic_body = basic_replica(record.body)  # its record's body in the view BASIC
        self.standing = standing_of(record)  # the input of the activation rule
        self.contents: Contents | None = None  # None until read; no assignment can be made before
        self.nodes = tuple(nodes_of(shape))  # ids of its nodes, the primary's first
        # Those of its nodes without which it cannot serve
        self.dense_nodes = frozenset(map(node_of, dense_devices_of(shape)))
        self.devices = tuple(devices_of(shape))  # all its GPUs
        self.report: report_pb2.ReplicaReport | None = None
        self.report_time_s: float | None = None
        # Addresses of its engines by node id, as last sent; None if this planner sent no assignment
        self.peers: dict[str, str] | None = None
        # Time since which it has been starting or draining; None if it is not, or waits for its GPUs
        self._since_s: float | None = None
        self.cannot_start = False  # whether its plan cannot be read
        # Whether all nodes need a new assignment, since one holds a later generation or has a new address
        self.must_reassign = False

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def primary_node(self) -> str:
        return self.nodes[0]

    @property
    def state(self) -> State.ValueType:
        return self.standing.state

    @property
    def is_draining(self) -> bool:
        return self.state == replica_pb2.REPLICA_STATE_DRAINING

    @property
    def is_stopping(self) -> bool:
        return self.state == replica_pb2.REPLICA_STATE_STOPPED

    @property
    def has_failed(self) -> bool:
        return self.state == replica_pb2.REPLICA_STATE_FAILED

    @property
    def is_passing(self) -> bool:
        """Whether it is starting or draining, both of which have a time limit."""
        return self._since_s is not None

    @property
    def generation(self) -> int:
        """The highest generation used so far, by an assignment or a change."""
        return self.record.generation

    @property
    def assigned_generation(self) -> int:
        return self.record.body.assigned_generation

    def take_contents(self, contents: Contents | None) -> None:
        """Set the contents of its plan.

        None: the plan cannot be read, so that a replica without an assignment never starts.
        """
        self.cannot_start = contents is None and self.standing.goal is None
        # Without contents, the replica can still be drained and stopped
        self.contents = contents or Contents(model=document_pb2.Document(), stages=())

    def take_report(self, report: report_pb2.ReplicaReport, *, time_s: float) -> None:
        """Record a report of its primary."""
        self.report, self.report_time_s = report, time_s

    def require_assignment(self) -> None:
        """Request a new assignment for all its nodes."""
        self.must_reassign = True

    def has_old_address(self, node: str, address: str, *, before: str) -> bool:
        """Return whether other nodes were sent another address of a node than its present one.

        ``before``: the last known address, perhaps stored by an earlier planner; empty if unknown.
        """
        if self.peers is not None:
            return self.peers.get(node, "") != address
        return bool(before and self.assigned_generation)

    @property
    def can_be_sent_again(self) -> bool:
        """Whether the assignment of an earlier planner can be sent to nodes that lack it."""
        return self.peers is None and self.contents is not None and not self.has_failed

    def passing_s(self, now_s: float, *, is_blocked: bool) -> float | None:
        """Return for how long it has been starting (since its GPUs became free) or draining, or None if it is not."""
        if self.state not in (replica_pb2.REPLICA_STATE_STARTING, replica_pb2.REPLICA_STATE_DRAINING) or is_blocked:
            self._since_s = None
            return None
        if self._since_s is None:
            self._since_s = now_s
        return now_s - self._since_s

    def renew(self, record: ReplicaRecord, standing: Standing | None = None) -> None:
        """Take over a newer record, and its ``standing`` if the fleet decided it."""
        before = self.state
        self.record, self.basic_body = record, basic_replica(record.body)
        self.standing = standing or replace(self.standing, state=record.state)
        if self.state != before:
            self._since_s = None

    def assignments(self, peers: Mapping[str, str], plan: str, *, is_new: bool) -> dict[str, WantedAssignment]:
        """Return the replica's last assignment by node id; equal generations have equal contents on every node.

        Unless ``is_new``, an earlier planner made it.
        """
        contents, goal = self.contents, self.standing.goal
        assert contents is not None
        assert goal is not None
        known = {node: address for node in self.nodes if (address := peers.get(node, ""))}
        self.peers = known if is_new else None
        if is_new:
            self.must_reassign = False
        return {
            node: WantedAssignment(
                generation=self.assigned_generation,
                assignment=replica_pb2.Assignment(
                    replica=self.name,
                    plan=self.record.plan or plan,
                    goal=goal,
                    shape=self.record.body.shape,
                    primary_node=self.primary_node,
                    devices=[device for device in self.devices if node_of(device) == node],
                    model=contents.model,
                    stages=contents.stages if node == self.primary_node else (),
                    conditions=conditions_of(self.standing),
                    peers=[replica_pb2.EnginePeer(node=peer, address=address) for peer, address in known.items()],
                    kv_partners=contents.kv_partners,
                    gpu_kinds=contents.gpu_kinds,
                ),
            )
            for node in self.nodes
        }


def standing_of(record: ReplicaRecord) -> Standing:
    """Return a replica's standing as far as it follows from its record."""
    body = record.body
    return Standing(
        state=record.state or replica_pb2.REPLICA_STATE_STARTING,
        goal=_GOAL_OF.get(record.state) if body.assigned_generation else None,
        conditions=tuple((one.device, one.status) for one in body.conditions),
        failure=body.failure if body.HasField("failure") else None,
    )


def conditions_of(standing: Standing) -> Sequence[replica_pb2.DeviceCondition]:
    return [replica_pb2.DeviceCondition(device=device, status=status) for device, status in standing.conditions]
