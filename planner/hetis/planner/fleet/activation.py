"""The activation rule: a replica's next state, from its state, its nodes' reports, and whether the active plan has it.

Up:    STARTING, goal LOAD on every node -> all LOADED -> goal SERVE on every node -> all SERVING -> SERVING
Down:  DRAINING, goal DRAIN -> nothing runs -> STOPPED, removed from every node
In between: DEGRADED without some attention workers, FAILED without a device of the dense path; both end by themselves
when the device is back. A node whose engine hetis does not control (UNMANAGED) counts as being in any wanted state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from hetis.planner.failures import Reason, ServiceError
from hetis.solver.cluster import node_of
from hetis.v1 import cluster_pb2, failure_pb2, replica_pb2, report_pb2

State = replica_pb2.ReplicaState
Goal = replica_pb2.AssignmentGoal
NodeState = cluster_pb2.NodeState
AssignmentState = report_pb2.AssignmentState
DeviceStatus = report_pb2.DeviceStatus

_SERVING = frozenset({AssignmentState.ASSIGNMENT_STATE_SERVING, AssignmentState.ASSIGNMENT_STATE_UNMANAGED})
_LOADED = _SERVING | {AssignmentState.ASSIGNMENT_STATE_LOADED}
# Reported by a node whose engine died or restarted. A silent node (UNSPECIFIED) is presumed to serve.
_DOWN = frozenset(
    {
        AssignmentState.ASSIGNMENT_STATE_LOADING,
        AssignmentState.ASSIGNMENT_STATE_LOADED,
        AssignmentState.ASSIGNMENT_STATE_STOPPED,
        AssignmentState.ASSIGNMENT_STATE_FAILED,
    }
)
_CANNOT = Reason.ERROR_REASON_ENGINE_CANNOT
UP_STATES = frozenset({State.REPLICA_STATE_SERVING, State.REPLICA_STATE_DEGRADED})


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOnNode:
    """The state of a replica's part on one node, as reported by the node."""

    presence: NodeState.ValueType
    is_draining: bool = False  # whether the node is to be emptied
    held: int = 0  # generation that the node holds
    state: AssignmentState.ValueType = AssignmentState.ASSIGNMENT_STATE_UNSPECIFIED
    failure: failure_pb2.Failure | None = None  # why the node failed or refused; None if it did not
    # Whether no request runs or waits on the replica; None if unknown, or if this is not the primary's node
    is_idle: bool | None = None

    @property
    def is_lost(self) -> bool:
        return self.presence == NodeState.NODE_STATE_LOST

    def has_reached(self, goal: Goal.ValueType | None, generation: int) -> bool:
        """Return whether the node has done its part of starting the replica with this goal."""
        return self.held >= generation and self.state in (_SERVING if goal == Goal.ASSIGNMENT_GOAL_SERVE else _LOADED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A replica's state in its life cycle, and what its last assignment contains."""

    state: State.ValueType
    goal: Goal.ValueType | None = None  # goal in the last assignment; None if none was made
    conditions: tuple[tuple[str, DeviceStatus.ValueType], ...] = ()  # status of devices by name, in the last assignment
    failure: failure_pb2.Failure | None = None  # why the replica is degraded or failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """The inputs of the rule besides the replica's own state."""

    is_wanted: bool  # whether the active plan contains the replica
    may_drain: bool  # whether every replica is up that the active plan starts on GPUs not held by departing replicas
    is_blocked: bool  # whether another replica is still on one of the replica's devices
    is_late: bool  # whether the replica has been starting, or draining, for longer than allowed
    generation: int  # generation of the last assignment
    parts: Mapping[str, ReplicaOnNode]  # by node id
    devices: tuple[str, ...]  # all devices of the replica, as `node/index`
    dense_nodes: frozenset[str]  # nodes without which the replica cannot serve


def next_standing(now: Standing, around: Surroundings) -> Standing:
    """Return the next state of a replica, or the same value if there is nothing to do."""
    if now.state == State.REPLICA_STATE_STOPPED:
        return now
    if now.state == State.REPLICA_STATE_DRAINING:
        if not around.is_wanted:
            return _draining(now, around)
        # The active plan contains the replica again, before it has stopped.
        return replace(now, state=State.REPLICA_STATE_SERVING, goal=Goal.ASSIGNMENT_GOAL_SERVE)
    if not around.is_wanted:
        if now.state not in UP_STATES:
            return replace(now, state=State.REPLICA_STATE_STOPPED)
        if around.may_drain:
            return replace(now, state=State.REPLICA_STATE_DRAINING, goal=Goal.ASSIGNMENT_GOAL_DRAIN)
    if now.state == State.REPLICA_STATE_STARTING:
        return _starting(now, around)
    return _serving(now, around)


def _starting(now: Standing, around: Surroundings) -> Standing:
    parts = around.parts
    if now.goal is None and around.is_blocked:
        return now
    lost = sorted(node for node, part in parts.items() if part.is_lost)
    if lost:
        return _failed(now, _unavailable(f"node {lost[0]} is lost", lost[0]))
    if around.is_late:
        late = sorted(node for node, part in parts.items() if not part.has_reached(now.goal, around.generation))
        return _failed(now, _unavailable(f"did not come up in time on {', '.join(late)}", late[0] if late else ""))
    if now.goal is None:
        ready = all(part.presence == NodeState.NODE_STATE_READY for part in parts.values())
        return replace(now, goal=Goal.ASSIGNMENT_GOAL_LOAD, conditions=_conditions(around, ())) if ready else now
    if (failure := _failure_of(parts.values())) is not None:
        return _failed(now, failure)
    if not all(part.has_reached(now.goal, around.generation) for part in parts.values()):
        return now
    if now.goal == Goal.ASSIGNMENT_GOAL_LOAD:
        return replace(now, goal=Goal.ASSIGNMENT_GOAL_SERVE)
    return replace(now, state=State.REPLICA_STATE_SERVING, failure=None)


def _serving(now: Standing, around: Surroundings) -> Standing:
    """Choose between SERVING, DEGRADED and FAILED again, from the nodes' reports."""
    parts = around.parts
    gone = {node for node, part in parts.items() if part.is_lost or (part.held and part.state in _DOWN)}
    dense = sorted(gone & around.dense_nodes)
    if dense:
        part = parts[dense[0]]
        failure = None if part.is_lost else part.failure
        is_loading = not part.is_lost and part.state == AssignmentState.ASSIGNMENT_STATE_LOADING
        what = "is loading the replica again: its engine restarted" if is_loading else "no longer serves the replica"
        return _failed(now, failure or _unavailable(f"node {dense[0]} {what}", dense[0]))
    if now.state == State.REPLICA_STATE_FAILED and (
        now.goal != Goal.ASSIGNMENT_GOAL_SERVE
        or not all(parts[node].has_reached(Goal.ASSIGNMENT_GOAL_SERVE, 1) for node in around.dense_nodes)
    ):
        return now
    conditions = _conditions(around, gone)
    if not gone:
        return Standing(state=State.REPLICA_STATE_SERVING, goal=Goal.ASSIGNMENT_GOAL_SERVE, conditions=conditions)
    node = min(gone)
    return Standing(
        state=State.REPLICA_STATE_DEGRADED,
        goal=Goal.ASSIGNMENT_GOAL_SERVE,
        conditions=conditions,
        failure=_unavailable(f"the attention workers of node {node} are lost", node),
    )


def _draining(now: Standing, around: Surroundings) -> Standing:
    def is_empty(part: ReplicaOnNode) -> bool:
        return part.is_lost or part.held == 0 or part.state == AssignmentState.ASSIGNMENT_STATE_STOPPED

    primary_idle = any(part.is_idle and part.held >= around.generation for part in around.parts.values())
    dense_lost = any(around.parts[node].is_lost for node in around.dense_nodes)
    if around.is_late or dense_lost or primary_idle or all(map(is_empty, around.parts.values())):
        return replace(now, state=State.REPLICA_STATE_STOPPED)
    return now


def _failed(now: Standing, failure: failure_pb2.Failure) -> Standing:
    if now.state == State.REPLICA_STATE_FAILED:
        return now  # keep the first failure
    return replace(now, state=State.REPLICA_STATE_FAILED, failure=failure)


def _failure_of(parts: Iterable[ReplicaOnNode]) -> failure_pb2.Failure | None:
    for part in parts:
        # An engine that serves may be unable to move heads, and says why; that is no reason to give it up.
        is_unsteered = part.state in _LOADED and part.failure is not None and part.failure.reason == _CANNOT
        if part.failure is not None and not is_unsteered:
            return part.failure
        if part.held and part.state == AssignmentState.ASSIGNMENT_STATE_FAILED:
            return _unavailable("a node could not load the replica", "")
    return None


def _conditions(around: Surroundings, gone: Collection[str]) -> tuple[tuple[str, DeviceStatus.ValueType], ...]:
    return tuple(
        (device, DeviceStatus.DEVICE_STATUS_LOST if node in gone else DeviceStatus.DEVICE_STATUS_DRAINING)
        for device, node in zip(around.devices, map(node_of, around.devices), strict=True)
        if node in gone or around.parts[node].is_draining
    )


def _unavailable(message: str, node: str) -> failure_pb2.Failure:
    metadata = {"device": node} if node else {}
    return ServiceError(Reason.ERROR_REASON_DEVICE_UNAVAILABLE, message, metadata=metadata).to_proto()
