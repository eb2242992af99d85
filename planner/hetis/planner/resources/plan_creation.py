"""CreatePlan: a problem that is posed and queued, or a plan that was made elsewhere."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from hetis.formats.errors import DocumentError
from hetis.planner.callers import present_caller
from hetis.planner.convert import names
from hetis.planner.convert.plans import result_to_proto
from hetis.planner.failures import Reason, ServiceError, invalid_document
from hetis.planner.jobs.pool import SolverPool
from hetis.planner.jobs.posed import PosedProblem
from hetis.planner.jobs.search import Search
from hetis.planner.resources.checking import Checks
from hetis.planner.resources.declared import DeclaredFleets
from hetis.planner.resources.hubs import Hubs
from hetis.planner.resources.live import FleetNow
from hetis.planner.resources.plan_imports import ImportedPlan, checked, read_plan, require_gpus
from hetis.planner.resources.plan_searches import PlanSearches, problem_name
from hetis.planner.resources.plan_specs import (
    ReadSpec,
    SearchLimits,
    check_labels,
    choose_profiles,
    gpu_types_of,
    pose,
    read_spec,
)
from hetis.planner.resources.plan_views import basic_view
from hetis.planner.resources.requests import CallAnswer, once, to_the_end
from hetis.planner.store import ClusterRecord, PlanRecord, ProfileRecord, Reader, Store, Transaction
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.solver.plan import Plan
from hetis.v1 import cluster_pb2, plan_pb2
from hetis.v1 import plan_service_pb2 as pb2

_SPEC, _IMPORTED = "plan.spec", "plan.imported"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchableProblem:
    """A problem that is ready to be searched."""

    problem: PosedProblem
    json: bytes


class PlanCreation:
    """Makes plans, for callers and for the planner itself (`propose`)."""

    def __init__(
        self,
        store: Store,
        hubs: Hubs,
        fleet: FleetNow,
        fleets: DeclaredFleets,
        pool: SolverPool,
        searches: PlanSearches,
        *,
        limits: SearchLimits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._hubs = hubs
        self._fleet = fleet
        self._fleets = fleets
        self._pool = pool
        self._searches = searches
        self._limits = limits
        self._clock = clock

    async def create(self, request: pb2.CreatePlanRequest) -> pb2.CreatePlanResponse:
        checks = Checks()
        if request.plan_id:
            checks.new_id("plan_id", request.plan_id)
        checks.request_id(request.request_id)
        checks.name("plan.cluster", request.plan.cluster, names.CLUSTER)
        check_labels(checks, request.plan.labels, "plan.labels")
        spec: ReadSpec | None = None
        given: Plan | None = None
        match request.plan.WhichOneof("source"):
            case "spec":
                spec = await read_spec(checks, request.plan.spec, _SPEC, self._limits)
            case "imported":
                given = await checks.document(_IMPORTED, request.plan.imported, read_plan)
            case None:
                checks.require(False, _SPEC, "is missing: send a spec to be solved, or a plan as imported")
        checks.raise_if_wrong()
        answer: SearchableProblem | ImportedPlan
        if spec is not None:
            answer = await self._posed(request.plan.cluster, spec)
        else:
            assert given is not None
            answer = await self._imported(request.plan.cluster, given, request.plan.imported.source_name)
        return await self._make(request, answer)

    async def propose(self, cluster: str, spec: plan_pb2.PlanSpec, reason: str) -> str:
        """Make a plan for the planner itself, because of ``reason``, and return its name.

        Raises:
            ServiceError: as `create`.
        """
        checks = Checks()
        read = await read_spec(checks, spec, _SPEC, self._limits)
        checks.raise_if_wrong()
        assert read is not None
        request = pb2.CreatePlanRequest(plan=plan_pb2.Plan(cluster=cluster, spec=spec))
        made = await self._make(request, await self._posed(cluster, read), proposal_reason=reason)
        return made.plan.name

    async def _posed(self, cluster: str, spec: ReadSpec) -> SearchableProblem:
        def read(reader: Reader) -> tuple[ClusterRecord, list[str], list[ProfileRecord]]:
            record = reader.clusters.require(cluster)
            draining = [names.last_part(node.name) for node in reader.nodes.all(cluster=cluster, draining=True)]
            return record, draining, [reader.profiles.require(name) for name in spec.profiles]

        record, draining, named = await self._store.read(read)
        declared = await self._fleets.of(record)
        lost = (
            names.last_part(name)
            for name, node in self._fleet.nodes_of(cluster).items()
            if node.state == cluster_pb2.NODE_STATE_LOST
        )
        left_out = frozenset(node for node in {*draining, *lost} if node in declared)
        gpus = gpu_types_of(declared.value)
        stored = await self._store.read(lambda reader: reader.profiles.all(gpu_type=frozenset(gpus)))
        profiles = choose_profiles(spec, named, stored, gpus, _SPEC)

        def posed() -> SearchableProblem:
            problem = pose(spec, record, declared.value, left_out, profiles)
            return SearchableProblem(problem=problem, json=problem.to_json())

        return await run_in_thread_gc_paused(posed)

    async def _imported(self, cluster: str, plan: Plan, source_name: str) -> ImportedPlan:
        record = await self._store.read(lambda reader: reader.clusters.require(cluster))
        declared = await self._fleets.of(record)
        try:
            imported = await run_in_thread_gc_paused(checked, plan, source_name or "document")
        except DocumentError as error:
            raise invalid_document(error, _IMPORTED) from None
        await run_in_thread_gc_paused(require_gpus, cluster, declared.value, plan.replicas)
        return imported

    async def _make(
        self, request: pb2.CreatePlanRequest, answer: SearchableProblem | ImportedPlan, *, proposal_reason: str = ""
    ) -> pb2.CreatePlanResponse:
        record = self._record(request, answer, proposal_reason)

        def require_free(reader: Reader) -> None:
            reader.clusters.require(record.cluster)
            if reader.plans.get(record.name) is not None:
                raise ServiceError(
                    Reason.ERROR_REASON_ALREADY_EXISTS, f"{record.name} exists already", metadata={"name": record.name}
                )

        if request.validate_only:
            await self._store.read(require_free)
            return pb2.CreatePlanResponse(plan=_without_state(record))
        place = self._place(answer)

        def insert(tx: Transaction) -> pb2.CreatePlanResponse:
            nonlocal record
            require_free(tx)
            if isinstance(place, ServiceError):
                raise place
            record = tx.plans.insert(record)
            if isinstance(answer, ImportedPlan):
                tx.plan_documents.put(record.name, answer.document)
            else:
                tx.plan_documents.put(problem_name(record.name), answer.json)
            return pb2.CreatePlanResponse(plan=basic_view(record))

        async def change() -> CallAnswer[pb2.CreatePlanResponse]:
            is_begun = False
            try:
                made = await self._store.write(lambda tx: once(tx, request, pb2.CreatePlanResponse, lambda: insert(tx)))
                if made.is_new:
                    self._hubs.plans.publish(record.name, basic_view(record), now_s=self._clock())
                    if isinstance(answer, SearchableProblem) and isinstance(place, Search):
                        self._searches.begin(record.name, place, answer.problem, answer.json)
                        is_begun = True
                return made
            finally:
                if isinstance(place, Search) and not is_begun:
                    place.abandon()

        return (await to_the_end(change())).response

    def _place(self, answer: SearchableProblem | ImportedPlan) -> Search | ServiceError | None:
        """Reserve a place in the queue, or return why there is none.

        A repeated request is answered even if the queue is full.
        """
        if isinstance(answer, ImportedPlan):
            return None
        try:
            return self._pool.reserve(present_caller().name)
        except ServiceError as error:
            return error

    def _record(
        self, request: pb2.CreatePlanRequest, answer: SearchableProblem | ImportedPlan, proposal_reason: str
    ) -> PlanRecord:
        given = request.plan
        plan_id = request.plan_id or f"plan-{uuid.uuid4().hex[:12]}"
        body = plan_pb2.Plan(
            labels=given.labels,
            origin=plan_pb2.PLAN_ORIGIN_PROPOSAL if proposal_reason else plan_pb2.PLAN_ORIGIN_CALLER,
            proposal_reason=proposal_reason,
        )
        state = plan_pb2.PLAN_STATE_QUEUED
        if isinstance(answer, ImportedPlan):
            state = plan_pb2.PLAN_STATE_READY
            body.result.CopyFrom(result_to_proto(answer.plan, answer.document))
            body.imported.kind = body.result.document.kind
            body.imported.source_name = given.imported.source_name
            body.imported.digest = body.result.document.digest
        else:
            body.spec.CopyFrom(given.spec)
        return PlanRecord(
            name=f"plans/{plan_id}",
            cluster=given.cluster,
            body=body,
            state=state,
            activation=plan_pb2.ACTIVATION_STATE_INACTIVE,
            create_time_s=self._clock(),
        )


def _without_state(record: PlanRecord) -> plan_pb2.Plan:
    """Return the plan that would be made, without the fields that are only decided when it is made."""
    plan = basic_view(record)
    for field in ("state", "activation", "etag", "create_time"):
        plan.ClearField(field)
    return plan
