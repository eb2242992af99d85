"""The calls of PlanService about existing plans: get, list, delete, watch, cancel, explain, diff, read the document."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

from hetis.planner.convert import names
from hetis.planner.convert.clusters import basic_view, full_view
from hetis.planner.convert.names import timestamp
from hetis.planner.convert.plans import complete, explanation_to_proto, replica_to_proto
from hetis.planner.failures import Reason, ServiceError, invalid_field, not_found
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.fleet.stored_plans import SEARCHING, StoredPlans, plan_state, require_answer
from hetis.planner.resources.checks import Checks, check, require_etag
from hetis.planner.resources.committing import Publish, change_once
from hetis.planner.resources.in_force import IN_FORCE, how_to_withdraw, is_withdrawable, publish_change, withdraw
from hetis.planner.resources.pages import read_page
from hetis.planner.resources.plan_creation import PlanSearches, forget_problem
from hetis.planner.resources.plan_documents import is_settled
from hetis.planner.store import PlanRecord, Reader, Store, Transaction
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.planner.use_cases.record.parts import MadeFrom, Requested
from hetis.planner.use_cases.saved_plans import PlanAndProblem
from hetis.planner.watching import LeftBehindError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan, ReplicaPlan
from hetis.solver.replanning.change import Holding, holdings_of
from hetis.v1 import plan_pb2, view_pb2
from hetis.v1 import plan_service_pb2 as pb2
from hetis.v1.replica_pb2 import ReplicaPlan as ReplicaMessage

PIECE_BYTES = 1 << 20


@dataclass(slots=True, eq=False)
class Plans:
    """The resource ``plans/{plan}``."""

    _store: Store
    _hubs: Hubs
    _fleet: LiveFleet
    _searches: PlanSearches
    _stored: StoredPlans

    async def get(self, request: pb2.GetPlanRequest) -> pb2.GetPlanResponse:
        check(request, name=names.PLAN)
        record = await self._store.read(lambda reader: reader.plans.require(request.name))
        if request.view == view_pb2.VIEW_BASIC:
            return pb2.GetPlanResponse(plan=self._basic(record))
        plan = full_view(record, self._searches.progress_of(record.name))
        if record.body.HasField("result"):
            answered = await self._stored.of(record)
            await run_in_thread_gc_paused(complete, plan, answered.plan, answered.document)
        return pb2.GetPlanResponse(plan=plan)

    async def list(self, request: pb2.ListPlansRequest) -> pb2.ListPlansResponse:
        checks = Checks()
        checks.request(request, optional=("cluster",), cluster=names.CLUSTER)
        states = checks.states("states", request.states, plan_pb2.PlanState)
        checks.raise_if_wrong()
        records, token = await read_page(self._store, request, Reader.plans, cluster=request.cluster, state=states)
        return pb2.ListPlansResponse(plans=map(self._basic, records), next_page_token=token)

    async def delete(self, request: pb2.DeletePlanRequest) -> pb2.DeletePlanResponse:
        check(request, name=names.PLAN)
        if request.validate_only:
            await self._store.read(lambda reader: _require_deletable(reader, request))
            return pb2.DeletePlanResponse()

        async def publish() -> None:
            self._hubs.plans.publish(request.name, None, now_s=self._store.clock())

        def delete(tx: Transaction) -> tuple[pb2.DeletePlanResponse, Publish]:
            record = _require_deletable(tx, request)
            tx.plans.delete(record.name)
            tx.plan_documents.delete(record.name)
            cluster = tx.clusters.get(record.cluster)
            if cluster is not None and cluster.earlier_plan == record.name:
                tx.clusters.update(replace(cluster, earlier_plan=""))
            return pb2.DeletePlanResponse(), publish

        return await change_once(self._store, request, pb2.DeletePlanResponse, delete)

    async def watch(self, request: pb2.WatchPlanRequest) -> AsyncIterator[pb2.WatchPlanResponse]:
        """Yield the plan's states until it can no longer change without a call.

        Raises NOT_FOUND, even if the plan is deleted during the watch; DRAINING if the planner shuts down; NOT_LEADER
        once its term is over.
        """
        check(request, name=names.PLAN)
        after = 0 if self._hubs.plans.is_too_old(request.after_sequence) else request.after_sequence
        while True:
            record = await self._store.read(lambda reader: reader.plans.require(request.name))
            try:
                async for response in self._states(record, after):
                    yield response
                return
            except LeftBehindError:  # the plan may have been deleted in the meantime
                continue

    async def _states(self, record: PlanRecord, after: int) -> AsyncIterator[pb2.WatchPlanResponse]:
        """Yield the plan's states after ``after`` until it is settled. Raises as `watch` does, or LeftBehindError."""
        hub, is_first = self._hubs.plans, True
        async for events in hub.watch():
            event = next((event for event in events if event.key == record.name), None)
            if event is None and is_first:
                # The plan has not changed in this term, so its state is the stored one.
                hub.publish(record.name, self._basic(record), now_s=self._store.clock())
            is_first = False
            if event is None:
                continue
            if event.value is None:
                raise not_found(record.name)
            if event.sequence > after:
                time = timestamp(event.time_s)
                yield pb2.WatchPlanResponse(sequence=event.sequence, plan=event.value, event_time=time)
            if is_settled(event.value):
                return
        raise ServiceError(Reason.ERROR_REASON_DRAINING, "this planner is shutting down: retry")

    async def cancel(self, request: pb2.CancelPlanRequest, *, withdraws: bool = True) -> pb2.CancelPlanResponse:
        """Cancel a plan's search. If it is over, nothing is changed, unless the call also ``withdraws`` plans.

        It then withdraws the plan's activation if nothing serves and there is no earlier plan.
        """
        check(request, name=names.PLAN)

        async def publish() -> None:
            self._searches.cancel(request.name)

        def cancel(tx: Transaction) -> tuple[pb2.CancelPlanResponse, Publish]:
            record = tx.plans.require(request.name)
            require_etag(record, request.etag)
            if record.state in SEARCHING:
                forget_problem(tx, record.name)
            elif withdraws and is_withdrawable(tx, record):
                cluster, record = withdraw(tx, record)
                withdrawn = partial(publish_change, self._store, self._hubs, self._fleet, cluster, [record])
                return pb2.CancelPlanResponse(plan=self._basic(record)), withdrawn
            return pb2.CancelPlanResponse(plan=self._basic(record)), publish

        return await change_once(self._store, request, pb2.CancelPlanResponse, cancel)

    async def explain(self, request: pb2.ExplainPlanRequest) -> pb2.ExplainPlanResponse:
        from hetis.solver.placement.explanation import explain_plan

        check(request, name=names.PLAN)
        answered = await self._stored.answered(request.name)

        def explained() -> pb2.ExplainPlanResponse:
            return explanation_to_proto(answered.plan, explain_plan(answered.plan, answered.problem))

        return await run_in_thread_gc_paused(explained)

    async def diff(self, request: pb2.DiffPlansRequest) -> pb2.DiffPlansResponse:
        check(request, name=names.PLAN, other=names.PLAN)
        one = await self._stored.answered(request.name)
        other = await self._stored.answered(request.other)
        return await run_in_thread_gc_paused(compare, one.found, other.found)

    async def read_document(self, request: pb2.ReadPlanDocumentRequest) -> AsyncIterator[pb2.ReadPlanDocumentResponse]:
        """Yield the document in pieces, from the offset on; a single empty piece if the offset is its end."""
        check(request, name=names.PLAN)

        def read(reader: Reader) -> tuple[PlanRecord, bytes | None]:
            return reader.plans.require(request.name), reader.plan_documents.get(request.name)

        record, document = await self._store.read(read)
        require_answer(record)
        assert document is not None, "a plan with a result has a document"
        if request.offset > len(document):
            raise invalid_field("offset", f"is {request.offset}, the document has {len(document)} bytes")
        for offset in range(request.offset, max(len(document), request.offset + 1), PIECE_BYTES):
            yield pb2.ReadPlanDocumentResponse(
                offset=offset,
                content=document[offset : offset + PIECE_BYTES],
                total_bytes=len(document),
                digest=record.body.result.document.digest,
            )

    def _basic(self, record: PlanRecord) -> plan_pb2.Plan:
        return basic_view(record, self._searches.progress_of(record.name) if record.state in SEARCHING else None)


def _require_deletable(reader: Reader, request: pb2.DeletePlanRequest) -> PlanRecord:
    record = reader.plans.require(request.name)
    require_etag(record, request.etag)
    if record.state in SEARCHING:
        raise plan_state(record, "cannot be deleted before its search has ended: cancel it first")
    cluster = reader.clusters.get(record.cluster)
    if record.activation in IN_FORCE or (cluster is not None and cluster.active_plan == record.name):
        raise ServiceError(
            Reason.ERROR_REASON_RESOURCE_IN_USE,
            f"{record.name} is in force in {record.cluster}{how_to_withdraw(reader, record)}",
            metadata={"name": record.name, "user": record.cluster},
        )
    return record


MOST_BYTES = (4 << 20) - (16 << 10)  # in an answer
_Kind = pb2.ReplicaDifferenceKind
_SETTINGS = (
    "roles", "engine", "engine_settings", "service_level", "seed", "gap_target", "time_limit_s"
)  # fmt: skip
_LIMITS = ("role", "micro_batch", "in_flight", "chunk_tokens", "kv_tokens")


def compare(one: PlanAndProblem, other: PlanAndProblem) -> pb2.DiffPlansResponse:
    """Return the differences between two plans. Raises MESSAGE_TOO_LARGE.

    Slow for large plans, so not for an event loop.
    """
    response = pb2.DiffPlansResponse(
        replicas=replica_differences(one, other),
        freed_devices=sorted(set(one.plan.devices()).difference(other.plan.devices())),
        taken_devices=sorted(set(other.plan.devices()).difference(one.plan.devices())),
        value=one.plan.result.value,
        other_value=other.plan.result.value,
        unit=one.plan.result.unit,
        other_unit=other.plan.result.unit,
        changed_inputs=sorted(_changed_inputs(one.plan, other.plan)),
    )
    added = (d for d in response.replicas if d.kind == _Kind.REPLICA_DIFFERENCE_KIND_ADDED)
    load_bytes = load_bytes_of(other.problem.model)
    response.load_bytes = sum(load_bytes(other.plan.replicas[difference.other_index]) for difference in added)
    if response.ByteSize() > MOST_BYTES:
        raise ServiceError(
            Reason.ERROR_REASON_MESSAGE_TOO_LARGE,
            f"the differences take {response.ByteSize()} bytes, the limit is {MOST_BYTES}:"
            " read both plans with ReadPlanDocument and compare them",
            metadata={"max_bytes": MOST_BYTES},
        )
    return response


def replica_differences(one: PlanAndProblem, other: PlanAndProblem) -> Iterator[pb2.ReplicaDifference]:
    """Yield the fate of the first plan's replicas, then the added ones; if the models differ, no replica is kept."""
    first, second = one.plan.replicas, other.plan.replicas
    is_same_model = one.problem.model == other.problem.model
    by_devices = {_dense(replica): index for index, replica in enumerate(second)} if is_same_model else {}
    matched = set[int]()
    for index, replica in enumerate(first):
        difference = pb2.ReplicaDifference(
            kind=_Kind.REPLICA_DIFFERENCE_KIND_REMOVED, index=index, replica=replica_to_proto(replica, one.plan)
        )
        other_index = by_devices.get(_dense(replica))
        if other_index is not None:
            matched.add(other_index)
            now = second[other_index]
            difference.kind, difference.other_index = _Kind.REPLICA_DIFFERENCE_KIND_KEPT, other_index
            message = replica_to_proto(now, other.plan)
            of_settings = list(_changed_settings(difference.replica, message))
            if of_settings or _without_predictions(replica) != _without_predictions(now):
                difference.kind = _Kind.REPLICA_DIFFERENCE_KIND_CHANGED
                difference.other_replica.CopyFrom(message)
                difference.changes.extend((*_changes(replica, now), *of_settings))
        yield difference
    for index, replica in enumerate(second):
        if index not in matched:
            added, message = _Kind.REPLICA_DIFFERENCE_KIND_ADDED, replica_to_proto(replica, other.plan)
            yield pb2.ReplicaDifference(kind=added, other_index=index, other_replica=message)


def _dense(replica: ReplicaPlan) -> tuple[object, ...]:
    """Return a key for the placement of weights on GPUs."""
    stages = tuple((s.gpu, s.tp, s.copies, s.first_layer, s.num_layers, s.devices) for s in replica.stages)
    return replica.expert_parallel, *stages


def _without_predictions(replica: ReplicaPlan) -> ReplicaPlan:
    """Return the replica without its rate and latencies, which depend on the workload and do not affect an engine."""
    return replace(replica, rate=0.0, ttft_s=0.0, tpot_s=0.0)


def _changes(before: ReplicaPlan, after: ReplicaPlan) -> Iterator[str]:
    if before.kv_zones != after.kv_zones:
        yield f"sends KV to {_zones(after)} instead of {_zones(before)}"
    for name in _LIMITS:
        if (old := getattr(before, name)) != (new := getattr(after, name)):
            yield f"{name} is {new} instead of {old}"
    for number in range(len(before.stages)):
        old_workers, new_workers = _workers(before, number), _workers(after, number)
        if old_workers != new_workers:
            yield f"stage {number} has {new_workers} instead of {old_workers}"
        old, new = before.stages[number].kv_head_groups_kept, after.stages[number].kv_head_groups_kept
        if old != new:
            yield f"stage {number} keeps {new} head groups per rank instead of {old}"


def _changed_settings(before: ReplicaMessage, after: ReplicaMessage) -> Iterator[str]:
    """Yield what changes of the settings that the plans were made for."""
    for name in ("seats_limit", "gpu_memory_utilization", "kv_blocks_limited"):
        if (old := getattr(before, name)) != (new := getattr(after, name)):
            yield f"{name} is {new or 'none'} instead of {old or 'none'}"


def _zones(replica: ReplicaPlan) -> str:
    return ", ".join(replica.kv_zones) or "nobody"


def _workers(replica: ReplicaPlan, stage: int) -> str:
    pools = [f"{p.gpu} {', '.join(p.devices)}" for p in replica.attention_workers if p.stage == stage]
    return f"attention workers {'; '.join(pools)}" if pools else "no attention workers"


def _changed_inputs(one: Plan, other: Plan) -> Iterator[str]:
    if one.strategy != other.strategy:
        yield "strategy"
    limits, other_limits = asdict(one.objective), asdict(other.objective)
    yield from (f"objective.{name}" for name in limits if limits[name] != other_limits[name])
    if Requested.of(one).constraints != Requested.of(other).constraints:
        yield "constraints"
    requested, other_requested = Requested.of(one), Requested.of(other)
    yield from (name for name in _SETTINGS if getattr(requested, name) != getattr(other_requested, name))
    digests, other_digests = (_digests(MadeFrom.of(each).digests) for each in (one, other))
    for path in digests.keys() | other_digests.keys():
        if digests.get(path) != other_digests.get(path):
            yield f"documents.{path}"


def _digests(digests: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in digests.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": str(digest) for inner, digest in value.items()}
        else:
            found[name] = str(value)
    return found


def load_bytes_of(model: ModelSpec) -> Callable[[ReplicaPlan], int]:
    """Return a function for the bytes of weights that the GPUs of a replica load; equal shards are computed once."""
    weight_bytes = cache(partial(Holding.weight_bytes, model=model))

    def load_bytes(replica: ReplicaPlan) -> int:
        held = (replace(one, rank=min(one.rank, 0)) for _, one in holdings_of(replica))
        return round(sum(map(weight_bytes, held)))

    return load_bytes
