"""Activation and rollback of plans: decided in one durable transaction, and carried out by the fleet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TypeVar

from hetis.formats.documents import digest
from hetis.planner.convert import names
from hetis.planner.convert.clusters import basic_view, without
from hetis.planner.convert.documents import DeclaredFleets
from hetis.planner.convert.names import timestamp
from hetis.planner.convert.plans import TO_PROTO, replica_from_proto, replica_to_proto, role_of
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.fleet.replica import devices_of, nodes_of
from hetis.planner.fleet.stored_plans import StoredPlans, plan_state
from hetis.planner.resources.checks import check, require_etag
from hetis.planner.resources.committing import Publish, answered_before, change_once
from hetis.planner.resources.in_force import IN_FORCE, how_to_withdraw, past, publish_change
from hetis.planner.resources.plan_documents import require_gpus
from hetis.planner.store import ClusterRecord, PlanRecord, Reader, ReplicaRecord, Store, Transaction, etag_of
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.solver.model import ModelSpec
from hetis.solver.plan import ReplicaPlan
from hetis.solver.replanning.change import Holding, holdings_of
from hetis.v1 import plan_pb2, replica_pb2
from hetis.v1 import plan_service_pb2 as pb2

MOST_BYTES = (4 << 20) - (16 << 10)  # in an answer
_TRIES = 5  # of a change whose cluster is changed by others while it is prepared
R = TypeVar("R", pb2.ActivatePlanResponse, pb2.RollbackPlanResponse)


class _OutdatedError(ServiceError):
    """The cluster was changed while a change was prepared, of which nothing was made."""


@dataclass(slots=True, eq=False)
class PlanActivation:
    """Decides which plan is active; the fleet carries out the decision."""

    _store: Store
    _hubs: Hubs
    _fleet: LiveFleet
    _fleets: DeclaredFleets
    _stored: StoredPlans

    async def activate(self, request: pb2.ActivatePlanRequest) -> pb2.ActivatePlanResponse:
        check(request, name=names.PLAN)

        def decide(reader: Reader) -> PlanRecord:
            plan = reader.plans.require(request.name)
            require_etag(plan, request.etag)
            cluster = reader.clusters.require(plan.cluster)
            require_etag(cluster, request.cluster_etag)
            if plan.activation not in IN_FORCE:
                _require_idle(reader, cluster)
            return plan

        return await self._change(request, pb2.ActivatePlanResponse, decide, is_rollback=False)

    async def rollback(self, request: pb2.RollbackPlanRequest) -> pb2.RollbackPlanResponse:
        check(request, name=names.PLAN)

        def earlier(reader: Reader) -> PlanRecord:
            plan = reader.plans.require(request.name)
            require_etag(plan, request.etag)
            cluster = reader.clusters.require(plan.cluster)
            if cluster.active_plan != plan.name:
                raise plan_state(plan, "is not in force")
            if not cluster.earlier_plan:
                message = f"no plan was in force in {cluster.name} before {plan.name}, or it was deleted"
                raise ServiceError(
                    Reason.ERROR_REASON_NO_EARLIER_PLAN,
                    message + how_to_withdraw(reader, plan),
                    metadata={"cluster": cluster.name, "plan": plan.name},
                )
            return reader.plans.require(cluster.earlier_plan)

        return await self._change(request, pb2.RollbackPlanResponse, earlier, is_rollback=True)

    async def _target(self, name: str) -> Target:
        """Return the plan with everything that is slow to compute. Raises NOT_FOUND, PLAN_STATE, INVENTORY_MISMATCH."""
        answered = await self._stored.answered(name)
        cluster = await self._store.require(Reader.clusters, answered.record.cluster)
        declared = await self._fleets.of(cluster)

        def prepare() -> Target:
            require_gpus(cluster.name, declared.value, answered.plan.replicas)
            load_bytes = load_bytes_of(answered.problem.model)
            return Target(
                record=answered.record,
                shapes=tuple(replica_to_proto(one, answered.plan) for one in answered.plan.replicas),
                model_digest=digest(answered.problem.model),
                cluster_digest=cluster.body.document.digest,
                load_bytes=lambda shape: load_bytes(replica_from_proto(shape)),
            )

        return await run_in_thread_gc_paused(prepare)

    async def _change(
        self,
        request: pb2.ActivatePlanRequest | pb2.RollbackPlanRequest,
        response: type[R],
        decide: Callable[[Reader], PlanRecord],
        *,
        is_rollback: bool,
    ) -> R:
        """Make the change in one durable transaction, then publish it to watchers and pass it to the fleet.

        ``decide`` returns the plan to put in force, or raises an error if that is not allowed. If another change came
        between the preparation and the transaction, both are done again.
        """

        async def once() -> R:
            try:
                name = (await self._store.read(decide)).name if is_rollback else request.name
                target = await self._target(name)
            except ServiceError as error:  # if a rollback is a repetition, another plan is active now
                return await answered_before(self._store, request, response, error)
            if request.validate_only:
                planned = await self._store.read(lambda reader: self._planned(reader, decide(reader), target))
                return _answer(response, planned)

            def work(tx: Transaction) -> tuple[R, Publish | None]:
                done = self._put_in_force(tx, decide(tx), target, is_rollback=is_rollback)
                if done.cluster is None:
                    return _answer(response, done), None
                publish = partial(publish_change, self._store, self._hubs, self._fleet, done.cluster, done.plans)
                return _answer(response, done), publish

            return await change_once(self._store, request, response, work)

        tries_left = _TRIES
        while True:
            tries_left -= 1
            try:
                return await once()
            except _OutdatedError:
                if not tries_left:
                    raise

    def _planned(self, reader: Reader, plan: PlanRecord, target: Target) -> ChangedPlans:
        """Return what `_put_in_force` would change."""
        if plan.activation in IN_FORCE:
            return ChangedPlans(cluster=None, plans=(plan,), steps=())
        cluster = reader.clusters.require(plan.cluster)
        steps, _ = transition_to(reader.replicas.all(cluster=cluster.name), cluster, target)
        return ChangedPlans(cluster=None, plans=(plan,), steps=tuple(steps))

    def _put_in_force(self, tx: Transaction, plan: PlanRecord, target: Target, *, is_rollback: bool) -> ChangedPlans:
        if plan.activation in IN_FORCE:
            return ChangedPlans(cluster=None, plans=(plan,), steps=())
        cluster = tx.clusters.require(plan.cluster)
        if plan.name != target.record.name or cluster.body.document.digest != target.cluster_digest:
            raise _OutdatedError(
                Reason.ERROR_REASON_ETAG_MISMATCH,
                f"{cluster.name} was changed at the same time: its etag is {etag_of(cluster)}; read it again and retry",
                metadata={"name": cluster.name, "etag": etag_of(cluster)},
            )
        records = tx.replicas.all(cluster=cluster.name)
        steps, matching = transition_to(records, cluster, target)
        self._keep_replicas(tx, plan, target, matching, {record.name: record for record in records})
        before = tx.plans.get(cluster.active_plan) if cluster.active_plan not in ("", plan.name) else None
        plans = [tx.plans.update(coming(plan, matching, self._store.clock()))]
        if before is not None:
            plans.append(tx.plans.update(past(before)))
        earlier = "" if is_rollback else earlier_after(cluster, plan, before)
        cluster = tx.clusters.update(replace(cluster, active_plan=plan.name, earlier_plan=earlier))
        return ChangedPlans(cluster=cluster, plans=tuple(plans), steps=tuple(steps))

    def _keep_replicas(
        self,
        tx: Transaction,
        plan: PlanRecord,
        target: Target,
        matching: Matching,
        records: Mapping[str, ReplicaRecord],
    ) -> None:
        """Assign kept and new replicas to the plan, and remove the others from any plan."""
        for index, (name, shape) in enumerate(zip(matching.names, target.shapes, strict=True)):
            if name in matching.kept:
                record = records[name]
                record.body.plan, record.body.plan_index = plan.name, index
                record.body.shape.CopyFrom(shape)  # its predictions may have changed
                tx.replicas.update(replace(record, plan=plan.name))
            else:
                tx.replicas.insert(new_replica(name, plan, index, shape, target.model_digest, self._store.clock()))
        for name, record in records.items():
            if name not in matching.kept and record.plan:
                record.body.ClearField("plan")
                tx.replicas.update(replace(record, plan=""))


def _require_idle(reader: Reader, cluster: ClusterRecord) -> None:
    """Check that the cluster's active plan has finished its activation. Raises ACTIVATION_IN_PROGRESS."""
    active = reader.plans.get(cluster.active_plan) if cluster.active_plan else None
    if active is not None and active.activation == plan_pb2.ACTIVATION_STATE_ACTIVATING:
        raise ServiceError(
            Reason.ERROR_REASON_ACTIVATION_IN_PROGRESS,
            f"{active.name} is being activated in {cluster.name}{how_to_withdraw(reader, active)}",
            metadata={"cluster": cluster.name, "plan": active.name},
        )


def _answer(response: type[R], change: ChangedPlans) -> R:
    """Return the answer, without the devices of its last steps if it would otherwise be too large."""
    answer = response(plan=basic_view(change.plans[0]), steps=change.steps)
    too_many_bytes = answer.ByteSize() - MOST_BYTES
    for step in reversed(answer.steps):
        if too_many_bytes <= 0:
            break
        too_many_bytes -= step.ByteSize()
        del step.devices[:]
        too_many_bytes += step.ByteSize()
    return answer


_GONE = frozenset({replica_pb2.REPLICA_STATE_STOPPED, replica_pb2.REPLICA_STATE_FAILED})


Kind = pb2.TransitionKind
Step = pb2.TransitionStep
START_BESIDE, DRAIN, START_INSTEAD = 1, 2, 3  # waves of a transition
# A plan's predictions for a replica, which change with the workload without any effect on an engine.
_PREDICTIONS = ("rate_rps", "ttft_s", "tpot_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """The correspondence between a plan's replicas and running ones."""

    names: tuple[str, ...]  # names of the replicas, kept and new, by index in the plan
    kept: frozenset[str]  # names of those that are already running and stay unchanged
    leaving: tuple[str, ...]  # names of running replicas that the plan does not contain, in order


def match_replicas(
    running: Mapping[str, replica_pb2.ReplicaPlan],
    plan_replicas: Sequence[replica_pb2.ReplicaPlan],
    *,
    cluster: str,
    plan: str,
    runs_same_model: Callable[[str], bool] = lambda _name: True,
    taken: Collection[str] = (),
) -> Matching:
    """Find the replicas of a plan that are already running, and name the others after the plan and their index in it.

    Args:
        running: shapes of the cluster's replicas by name, except those that stopped or failed.
        plan_replicas: the plan's replicas, in its order.
        cluster: `clusters/{cluster}`.
        plan: `plans/{plan}`.
        runs_same_model: returns whether a running replica serves the plan's model, with the same precision.
        taken: names of all replicas with a record, which no new replica may have.
    """
    free: dict[bytes, list[str]] = {}
    for name, shape in running.items():
        if runs_same_model(name):
            free.setdefault(_engine_identity(shape), []).append(name)
    found = [(free.get(_engine_identity(shape)) or [""]).pop(0) for shape in plan_replicas]
    used = {*taken, *running}
    names = tuple(name or _unused_name(cluster, plan, index, used) for index, name in enumerate(found))
    kept = frozenset(filter(None, found))
    return Matching(names=names, kept=kept, leaving=tuple(name for name in running if name not in kept))


def plan_transition(
    running: Mapping[str, replica_pb2.ReplicaPlan],
    plan_replicas: Sequence[replica_pb2.ReplicaPlan],
    matching: Matching,
    load_bytes: Callable[[replica_pb2.ReplicaPlan], int],
) -> list[Step]:
    """Return the steps from the running replicas to a plan whose replicas `match_replicas` has matched.

    Wave 1 starts replicas that need no GPU of a departing replica, wave 2 drains the departing ones, wave 3 starts the
    rest. Kept replicas are in wave 1. ``load_bytes`` returns the bytes that the GPUs of a replica load.
    """
    leaving = [
        Step(wave=DRAIN, kind=Kind.TRANSITION_KIND_DRAIN, replica=name, devices=devices_of(running[name]))
        for name in matching.leaving
    ]
    occupied = {device for step in leaving for device in step.devices}
    steps = [*leaving]
    for name, shape in zip(matching.names, plan_replicas, strict=True):
        devices = devices_of(shape)
        if name in matching.kept:
            steps.append(Step(wave=START_BESIDE, kind=Kind.TRANSITION_KIND_KEEP, replica=name, devices=devices))
        else:
            wave = START_BESIDE if occupied.isdisjoint(devices) else START_INSTEAD
            start = Step(wave=wave, kind=Kind.TRANSITION_KIND_START, replica=name, devices=devices)
            start.load_bytes = load_bytes(shape)
            steps.append(start)
    return sorted(steps, key=lambda step: step.wave)


def _engine_identity(shape: replica_pb2.ReplicaPlan) -> bytes:
    same = without(shape, *_PREDICTIONS)
    same.role = TO_PROTO[role_of(shape)]  # replicas started before roles existed are unified
    return same.SerializeToString(deterministic=True)


def _unused_name(cluster: str, plan: str, index: int, used: set[str]) -> str:
    first = f"{cluster}/replicas/{names.last_part(plan)}-{index}"
    name, again = first, 1
    while name in used:
        again += 1
        name = f"{first}-{again}"
    used.add(name)
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A plan to be activated, with everything that is slow to compute."""

    record: PlanRecord  # the plan's record as read before; the transaction reads it again
    shapes: tuple[replica_pb2.ReplicaPlan, ...]
    model_digest: str
    cluster_digest: str  # digest of the cluster's document in which the plan's GPUs were found
    load_bytes: Callable[[replica_pb2.ReplicaPlan], int]  # returns the bytes of weights that the GPUs of a replica load


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedPlans:
    """The records that a transaction has changed, and the steps that follow."""

    cluster: ClusterRecord | None  # the cluster's new record; None if the plan was already active (no change)
    plans: tuple[PlanRecord, ...]  # the changed plans, the newly active one first
    steps: tuple[pb2.TransitionStep, ...]  # the steps from the running replicas to the plan


def transition_to(
    records: Sequence[ReplicaRecord], cluster: ClusterRecord, target: Target
) -> tuple[list[pb2.TransitionStep], Matching]:
    models = {record.name: record.body.model_digest for record in records}
    running = {record.name: record.body.shape for record in records if record.state not in _GONE}
    matching = match_replicas(
        running,
        target.shapes,
        cluster=cluster.name,
        plan=target.record.name,
        runs_same_model=lambda name: models[name] == target.model_digest,
        taken=models.keys(),
    )
    return plan_transition(running, target.shapes, matching, target.load_bytes), matching


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


def earlier_after(cluster: ClusterRecord, plan: PlanRecord, before: PlanRecord | None) -> str:
    """Return the target of a later rollback: the last plan that came up, never the one being activated."""
    was_up = before is not None and before.activation != plan_pb2.ACTIVATION_STATE_FAILED
    earlier = before.name if before is not None and was_up else cluster.earlier_plan
    return "" if earlier == plan.name else earlier


def load_bytes_of(model: ModelSpec) -> Callable[[ReplicaPlan], int]:
    """Return a function for the bytes of weights that the GPUs of a replica load; equal shards are computed once."""
    weight_bytes = cache(partial(Holding.weight_bytes, model=model))

    def load_bytes(replica: ReplicaPlan) -> int:
        held = (replace(one, rank=min(one.rank, 0)) for _, one in holdings_of(replica))
        return round(sum(map(weight_bytes, held)))

    return load_bytes
