"""The transition to a new active plan: which replicas continue, and how the records change. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hetis.planner.convert.roles import TO_PROTO, role_of
from hetis.planner.convert.times import timestamp
from hetis.planner.fleet.transition import Matching, match_replicas, nodes_of, plan_transition
from hetis.planner.store import ClusterRecord, PlanRecord, ReplicaRecord
from hetis.v1 import plan_pb2, replica_pb2
from hetis.v1 import plan_service_pb2 as pb2

_GONE = frozenset({replica_pb2.REPLICA_STATE_STOPPED, replica_pb2.REPLICA_STATE_FAILED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A plan to be activated, with everything slow computed before the transaction.

    Attributes:
        record: of the plan as read before; the transaction reads it again.
        shapes: of its replicas.
        model_digest: of its model.
        cluster_digest: of the cluster's document that was found to have its GPUs.
        load_bytes: returns the bytes of weights that the GPUs of a replica load.
    """

    record: PlanRecord
    shapes: tuple[replica_pb2.ReplicaPlan, ...]
    model_digest: str
    cluster_digest: str
    load_bytes: Callable[[replica_pb2.ReplicaPlan], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedPlans:
    """The changes of a transaction.

    Attributes:
        cluster: its new record; None if the plan was active already, so that nothing was done.
        plans: the changed ones, the newly active one first.
        steps: from what ran to the plan.
    """

    cluster: ClusterRecord | None
    plans: tuple[PlanRecord, ...]
    steps: tuple[pb2.TransitionStep, ...]


def transition_to(
    records: Sequence[ReplicaRecord], cluster: ClusterRecord, target: Target
) -> tuple[list[pb2.TransitionStep], Matching]:
    models = {record.name: record.body.model_digest for record in records}
    running = {record.name: record.body.shape for record in records if record.state not in _GONE}

    def runs_same_model(name: str) -> bool:
        return models[name] == target.model_digest

    name = target.record.name
    matching = match_replicas(
        running, target.shapes, cluster=cluster.name, plan=name, runs_same_model=runs_same_model, taken=models.keys()
    )
    steps = plan_transition(
        running,
        target.shapes,
        cluster=cluster.name,
        plan=name,
        load_bytes=target.load_bytes,
        runs_same_model=runs_same_model,
        taken=models.keys(),
    )
    return steps, matching


def new_replica(
    name: str, plan: PlanRecord, index: int, shape: replica_pb2.ReplicaPlan, model_digest: str, now_s: float
) -> ReplicaRecord:
    nodes = nodes_of(shape)
    body = replica_pb2.Replica(
        name=name,
        plan=plan.name,
        plan_index=index,
        shape=shape,
        state=replica_pb2.REPLICA_STATE_STARTING,
        authority=replica_pb2.HEAD_MAP_AUTHORITY_ENGINE,  # until its primary's agent reports what its engine can do
        primary_node=nodes[0],
        nodes=nodes,
        model_digest=model_digest,
        role=TO_PROTO[role_of(shape)],
        create_time=timestamp(now_s),
    )
    return ReplicaRecord(name=name, cluster=plan.cluster, plan=plan.name, body=body, state=body.state)


def coming(plan: PlanRecord, matching: Matching, now_s: float) -> PlanRecord:
    plan.body.activate_time.CopyFrom(timestamp(now_s))
    plan.body.activation_progress.CopyFrom(
        plan_pb2.ActivationProgress(
            num_serving=len(matching.kept),
            num_starting=len(matching.names) - len(matching.kept),
            num_draining=len(matching.leaving),
        )
    )
    return replace(plan, activation=plan_pb2.ACTIVATION_STATE_ACTIVATING)


def past(plan: PlanRecord) -> PlanRecord:
    plan.body.activation_progress.CopyFrom(plan_pb2.ActivationProgress())
    return replace(plan, activation=plan_pb2.ACTIVATION_STATE_INACTIVE)


def earlier_after(cluster: ClusterRecord, plan: PlanRecord, before: PlanRecord | None) -> str:
    """Return the target of a later rollback: the last plan that came up, never the one being activated."""
    was_up = before is not None and before.activation != plan_pb2.ACTIVATION_STATE_FAILED
    earlier = before.name if before is not None and was_up else cluster.earlier_plan
    return "" if earlier == plan.name else earlier
