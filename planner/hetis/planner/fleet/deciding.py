"""Decisions about a cluster: which records to write next."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.activation import (
    UP_STATES,
    Goal,
    NodeState,
    ReplicaOnNode,
    Standing,
    State,
    Surroundings,
    next_standing,
)
from hetis.planner.fleet.cluster import ClusterFleet
from hetis.planner.fleet.replica import Replica
from hetis.planner.fleet.writes import PlanWrite, ReplicaWrite, Writes
from hetis.v1 import plan_pb2, report_pb2

Activation = plan_pb2.ActivationState
MOST_AWAITED = 3  # nodes named in the progress of an activation
_log = logging.getLogger("hetis.planner.fleet")


def needs_decision(cluster: ClusterFleet) -> bool:
    """Return whether `decide` may have something to write."""
    return bool(
        cluster.dirty
        or cluster.decide_all
        or cluster.node_records.writes
        or cluster.node_records.unneeded
        or cluster.changes.has_unsaved
    )


def decide(cluster: ClusterFleet, *, now_s: float) -> Writes:
    """Return the next writes. Replicas whose contents have not been read yet are left unchanged."""
    if cluster.record is None:
        return Writes(cluster=cluster.name)
    view = _ClusterView.of(cluster)
    names = cluster.replicas if cluster.decide_all or view.is_unsettled else cluster.dirty & cluster.replicas.keys()
    replicas = []
    for name in list(names):
        try:
            write = _decide_replica(cluster, view, cluster.replicas[name], now_s)
        except Exception:  # a bug in one replica must not stop the others; it is retried when the replica changes
            _log.exception(
                "the next state of a replica could not be determined", extra={"cluster": cluster.name, "replica": name}
            )
            continue
        if write is not None:
            replicas.append(write)
    plan = _decide_plan(cluster, view, replicas)
    writes = Writes(
        cluster=cluster.name,
        replicas=replicas,
        nodes=list(cluster.node_records.writes.values()),
        unneeded_nodes=cluster.node_records.take_unneeded(cluster.is_needed),
        plan=plan,
        redispatches=cluster.changes.to_save(),
    )
    cluster.decided()
    return writes


@dataclass(frozen=True, slots=True, kw_only=True)
class _ClusterView:
    """The inputs of the rule that are common to all replicas."""

    wanted: frozenset[str]  # the replicas of the active plan
    occupied: dict[str, list[str]]  # names of the replicas on each device
    may_drain: bool  # whether every replica is up that the plan starts on GPUs not held by departing replicas
    is_unsettled: bool  # whether any replica is not up, or not wanted

    @classmethod
    def of(cls, cluster: ClusterFleet) -> _ClusterView:
        replicas = cluster.replicas.values()
        wanted = frozenset(_wanted(cluster))
        is_unsettled = any(one.state not in UP_STATES or one.name not in wanted for one in replicas)
        if not is_unsettled:
            return cls(wanted=wanted, occupied={}, may_drain=True, is_unsettled=False)
        occupied: dict[str, list[str]] = {}
        for one in replicas:
            for device in one.devices:
                occupied.setdefault(device, []).append(one.name)
        plan = cluster.plan
        has_failed = plan is not None and plan.activation == Activation.ACTIVATION_STATE_FAILED
        may_drain = not has_failed and all(
            one.state in UP_STATES or _waits_for_others(one, occupied)
            for one in (cluster.replicas[name] for name in wanted)
        )
        return cls(wanted=wanted, occupied=occupied, may_drain=may_drain, is_unsettled=True)


def _wanted(cluster: ClusterFleet) -> Iterable[str]:
    """Yield the replicas of the active plan, except failed ones that have a replacement."""
    assert cluster.record is not None
    active = cluster.record.active_plan
    of_plan = [one for one in cluster.replicas.values() if active and one.record.plan == active]
    alive = {one.record.body.plan_index for one in of_plan if not one.has_failed}
    for one in of_plan:
        if not one.is_stopping and (not one.has_failed or one.record.body.plan_index not in alive):
            yield one.name


def _waits_for_others(replica: Replica, occupied: dict[str, list[str]]) -> bool:
    return (
        replica.state == State.REPLICA_STATE_STARTING
        and replica.standing.goal is None
        and any(len(occupied[device]) > 1 for device in replica.devices)
    )


def _decide_replica(cluster: ClusterFleet, view: _ClusterView, replica: Replica, now_s: float) -> ReplicaWrite | None:
    now, change = replica.standing, cluster.changes.of(replica)
    parts = parts_of(cluster, replica)
    if replica.is_stopping:
        if any(part.held and not part.is_lost for part in parts.values()) or change is not None:
            return None
        return ReplicaWrite(
            name=replica.name,
            plan=replica.record.plan,
            standing=now,
            generation=replica.generation,
            assigned_generation=replica.assigned_generation,
            is_gone=True,
        )
    is_blocked = bool(view.occupied) and _waits_for_others(replica, view.occupied)
    if now.goal is None and not is_blocked:
        # One of its nodes may still hold a replica that it was ordered to remove
        is_blocked = any(node in cluster.links and cluster.links[node].is_clearing for node in replica.nodes)
    passing_s = replica.passing_s(now_s, is_blocked=is_blocked)
    most_s = cluster.settings.drain_s if replica.is_draining else cluster.settings.start_s
    after = next_standing(
        now,
        Surroundings(
            is_wanted=replica.name in view.wanted,
            may_drain=view.may_drain,
            is_blocked=is_blocked,
            is_late=passing_s is not None and passing_s >= most_s,
            generation=replica.assigned_generation,
            parts=parts,
            devices=replica.devices,
            dense_nodes=replica.dense_nodes,
        ),
    )
    if replica.cannot_start and after.goal == Goal.ASSIGNMENT_GOAL_LOAD and now.goal is None:
        message = f"{replica.record.plan} cannot be read back: see the planner's log"
        failure = ServiceError(Reason.ERROR_REASON_PLAN_CHECK_FAILED, message).to_proto()
        after = Standing(state=State.REPLICA_STATE_FAILED, failure=failure)
    is_new = (after.goal, after.conditions) != (now.goal, now.conditions) or replica.must_reassign
    if replica.has_failed and any(part.held < replica.assigned_generation for part in parts.values()):
        is_new = True  # while it had failed, its last assignment was sent to no node
    if after.goal is None or after.state in (State.REPLICA_STATE_STOPPED, State.REPLICA_STATE_FAILED):
        is_new = False
    if is_new and replica.contents is None:
        return None  # retried once the contents are known
    if change is not None and (is_new or after.state == State.REPLICA_STATE_STOPPED):
        failure = ServiceError(Reason.ERROR_REASON_CHANGE_CANCELLED, f"{replica.name} is being reassigned").to_proto()
        if after.state == State.REPLICA_STATE_STOPPED:
            change.give_up(failure)
        else:
            change.call_off(failure)
            cluster.changes.pass_directives(change)
    generation = replica.generation
    if change is not None:
        generation = max(generation, change.body.change.generation)
    if is_new:
        held = [part.held for part in parts.values()]
        generation = max(generation, *held) + 1
    if not is_new and after == now and generation == replica.generation:
        return None
    return ReplicaWrite(
        name=replica.name,
        plan=replica.record.plan,
        standing=after,
        generation=generation,
        assigned_generation=generation if is_new else replica.assigned_generation,
    )


def parts_of(cluster: ClusterFleet, replica: Replica) -> dict[str, ReplicaOnNode]:
    """Return what is known of a replica on each of its nodes, the primary's first."""
    return {node: _part(cluster, replica, node) for node in replica.nodes}


def _part(cluster: ClusterFleet, replica: Replica, node: str) -> ReplicaOnNode:
    state, is_draining = cluster.leases.state(node), cluster.node_records.is_draining(node)
    slot = cluster.slot(node, replica.name)
    if slot is None:
        return ReplicaOnNode(presence=state, is_draining=is_draining)
    if not slot.is_believed:  # for this replica, the node counts as lost
        return ReplicaOnNode(presence=NodeState.NODE_STATE_LOST, is_draining=is_draining, failure=slot.failure)
    report = slot.report
    draining = report_pb2.ASSIGNMENT_STATE_DRAINING, report_pb2.ASSIGNMENT_STATE_UNMANAGED
    is_idle = None
    if report is not None and node == replica.primary_node:
        is_idle = slot.state in draining and report.num_running == report.num_waiting == 0
    return ReplicaOnNode(
        presence=state,
        is_draining=is_draining,
        held=slot.held,
        state=slot.state,
        failure=slot.failure,
        is_idle=is_idle,
    )


def _decide_plan(cluster: ClusterFleet, view: _ClusterView, writes: Iterable[ReplicaWrite]) -> PlanWrite | None:
    plan = cluster.plan
    if plan is None or plan.activation == Activation.ACTIVATION_STATE_INACTIVE:
        return None
    states = {name: replica.standing for name, replica in cluster.replicas.items()}
    for write in writes:
        states[write.name] = write.standing
        if write.is_gone:
            del states[write.name]
    progress = progress_of(states, view.wanted)
    activation = plan.activation
    if activation == Activation.ACTIVATION_STATE_ACTIVATING:
        if progress.num_failed:
            activation = Activation.ACTIVATION_STATE_FAILED
        elif not progress.num_starting and len(states) == len(view.wanted & states.keys()):
            activation = Activation.ACTIVATION_STATE_ACTIVE
        else:
            awaited = _awaited_nodes(cluster, states, view.wanted)
            progress.awaited_nodes.extend(awaited[:MOST_AWAITED])
            progress.num_awaited_nodes = len(awaited)
    cluster.note_progress(progress)
    is_settled = not progress.num_starting and not progress.num_draining
    if activation == plan.activation and not (is_settled and progress != plan.body.activation_progress):
        return None  # intermediate progress is published but not stored: it must not change the etag
    return PlanWrite(name=plan.name, activation=activation, progress=progress)


def progress_of(states: dict[str, Standing], wanted: frozenset[str]) -> plan_pb2.ActivationProgress:
    """Return the progress of the replicas ``wanted`` by a plan; ``states`` are those of all replicas of the cluster."""
    of_plan = [states[name] for name in wanted if name in states]
    failed = [one for one in of_plan if one.state == State.REPLICA_STATE_FAILED]
    num_serving = sum(one.state in UP_STATES for one in of_plan)
    progress = plan_pb2.ActivationProgress(
        num_serving=num_serving,
        num_failed=len(failed),
        num_starting=len(of_plan) - num_serving - len(failed),
        num_draining=sum(
            one.state in (State.REPLICA_STATE_DRAINING, State.REPLICA_STATE_STOPPED)
            for name, one in states.items()
            if name not in wanted
        ),
    )
    first = next((one.failure for one in failed if one.failure is not None), None)
    if first is not None:
        progress.failure.CopyFrom(first)
    return progress


def _awaited_nodes(cluster: ClusterFleet, states: Mapping[str, Standing], wanted: Iterable[str]) -> list[str]:
    """Return the ids of the nodes that hold up starting replicas: those without an agent first, each part by name."""
    absent, loading = set[str](), set[str]()
    for name in wanted:
        standing = states.get(name)
        if standing is None or standing.state != State.REPLICA_STATE_STARTING:
            continue
        replica = cluster.replicas[name]
        for node in replica.nodes:
            if cluster.leases.state(node) != NodeState.NODE_STATE_READY:
                absent.add(node)
            elif standing.goal is not None:
                part = _part(cluster, replica, node)
                if not part.has_reached(standing.goal, replica.assigned_generation):
                    loading.add(node)
    return [*sorted(absent), *sorted(loading)]
