"""CreatePlan: poses and searches a problem, or imports a plan that was made elsewhere."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from hetis.formats.errors import DocumentError
from hetis.formats.files import content_digest
from hetis.planner.callers import PLANNER, present_caller
from hetis.planner.convert import names
from hetis.planner.convert.clusters import basic_view, without
from hetis.planner.convert.documents import DeclaredFleets
from hetis.planner.convert.names import timestamp
from hetis.planner.convert.plans import progress_to_proto, result_to_proto
from hetis.planner.failures import Reason, ServiceError, invalid_document
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.fleet.stored_plans import SEARCHING
from hetis.planner.jobs.messages import (
    CalledOff,
    Crashed,
    FoundPlan,
    Outcome,
    PosedProblem,
    posed_from_json,
)
from hetis.planner.jobs.pool import Begun, PooledSearch, SolverPool
from hetis.planner.resources.checks import Checks
from hetis.planner.resources.committing import Publish, answered_before, change_once, to_the_end
from hetis.planner.resources.plan_documents import ImportedPlan, checked, read_plan, require_gpus
from hetis.planner.resources.plan_specs import (
    SPEC,
    SearchLimits,
    check_labels,
    choose_profiles,
    pose,
    read_spec,
)
from hetis.planner.store import ClusterRecord, PlanRecord, ProfileRecord, Reader, Store, Transaction
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.planner.use_cases.precision import gpu_types_of
from hetis.planner.use_cases.request import PlacementRequest
from hetis.solver.budget import Progress
from hetis.solver.errors import (
    HetisError,
    InfeasibleError,
    InvalidProblemError,
    NoPlanFoundError,
    UncheckedPlanError,
)
from hetis.solver.plan import Plan
from hetis.v1 import cluster_pb2, failure_pb2, plan_pb2
from hetis.v1 import plan_service_pb2 as pb2

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0  # between attempts to write to an unavailable store


def problem_name(plan: str) -> str:
    """Return the name of a plan's problem, which is stored among the plan documents during the search."""
    return f"{plan}/problem"


def caller_name(plan: str) -> str:
    """Return the name under which a search's caller is stored beside its problem, for the quotas of the next planner.

    Stores of earlier versions lack it.
    """
    return f"{plan}/caller"


def forget_problem(tx: Transaction, plan: str) -> None:
    """Delete what is stored for the search, so that the next planner does not restart it."""
    for name in (problem_name(plan), caller_name(plan)):
        tx.plan_documents.delete(name)


@dataclass(slots=True, eq=False)
class PlanSearches:
    """The searches of one planner. `begin` and `resume` start them; `stop` leaves them to the next planner."""

    _store: Store
    _hubs: Hubs
    _pool: SolverPool
    _searches: dict[str, PooledSearch] = field(default_factory=dict)
    _progress: dict[str, plan_pb2.SolveProgress] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def progress_of(self, plan: str) -> plan_pb2.SolveProgress | None:
        """Return the latest progress of a running search, or None."""
        return self._progress.get(plan)

    def begin(self, plan: str, search: PooledSearch, posed: PosedProblem, posed_json: bytes) -> None:
        """Begin the search for a plan that is already in the store."""
        self._searches[plan] = search
        search.begin(posed_json, time_limit_s=posed.settings.time_limit_s)
        task = asyncio.create_task(self._follow(plan, search, posed), name=f"search for {plan}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self, plan: str) -> None:
        """Cancel the search; does nothing if it has ended."""
        if (search := self._searches.get(plan)) is not None:
            search.cancel()

    def cluster_deleted(self, _cluster: str, plans: Sequence[str]) -> None:
        """Cancel the searches for plans of a deleted cluster."""
        for plan in plans:
            self.cancel(plan)

    async def resume(self) -> None:
        """Restart the searches that the previous planner did not finish, oldest first, however many there are."""
        left = await self._store.read(lambda reader: reader.plans.all(state=SEARCHING))
        for record in reversed(left):
            posed_json, caller = await self._stored(record.name)
            if posed_json is None:
                await self._end(record.name, None, CalledOff())
                continue
            try:
                posed = await run_in_thread_gc_paused(posed_from_json, posed_json)
            except DocumentError as error:
                await self._end(
                    record.name, None, InvalidProblemError(f"the problem was created by another version: {error}")
                )
                continue
            if record.state != plan_pb2.PLAN_STATE_QUEUED:
                await self._change(record.name, _queued_again)
            self.begin(record.name, self._pool.reserve(caller, even_if_full=True), posed, posed_json)

    async def _stored(self, plan: str) -> tuple[bytes | None, str]:
        """Return a plan's problem, if it is still wanted, and the name of the caller who requested it."""

        def read(reader: Reader) -> tuple[bytes | None, str]:
            caller = reader.plan_documents.get(caller_name(plan))
            return reader.plan_documents.get(problem_name(plan)), caller.decode() if caller else PLANNER.name

        return await self._store.read(read)

    async def stop(self) -> None:
        """Stop following the searches; in the store they remain QUEUED or SOLVING."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, plan: str, search: PooledSearch, posed: PosedProblem) -> None:
        record: PlanRecord | None = None
        try:
            async for event in search.events():
                match event:
                    case Begun():
                        record = await self._change(plan, self._solving)
                    case Progress():
                        self._progress[plan] = progress_to_proto(event, posed.objective.unit)
                        if record is not None:
                            self._publish(record)
                    case outcome:
                        await self._end(plan, posed, outcome, is_called_off=search.is_called_off)
        finally:
            self._searches.pop(plan, None)
            self._progress.pop(plan, None)

    def _publish(self, record: PlanRecord) -> None:
        progress = self._progress.get(record.name) if record.state in SEARCHING else None
        self._hubs.plans.publish(record.name, basic_view(record, progress), now_s=self._store.clock())

    def _solving(self, record: PlanRecord, _tx: Transaction) -> PlanRecord:
        record.body.solve_start_time.CopyFrom(timestamp(self._store.clock()))
        return replace(record, state=plan_pb2.PLAN_STATE_SOLVING)

    async def _end(
        self, plan: str, posed: PosedProblem | None, outcome: Outcome, *, is_called_off: bool = True
    ) -> None:
        result: plan_pb2.PlanResult | None = None
        if isinstance(outcome, FoundPlan):
            result = plan_pb2.PlanResult.FromString(outcome.result)
            if await run_in_thread_gc_paused(content_digest, outcome.document) != result.document.digest:
                outcome = UncheckedPlanError(("its document differs from the one that was checked",))

        def change(record: PlanRecord, tx: Transaction) -> PlanRecord:
            forget_problem(tx, plan)
            record.body.solve_end_time.CopyFrom(timestamp(self._store.clock()))
            if (progress := self._progress.get(plan)) is not None:
                record.body.progress.CopyFrom(progress)
            if result is not None and isinstance(outcome, FoundPlan):
                tx.plan_documents.put(plan, outcome.document)
                record.body.result.CopyFrom(result)
                interrupted = is_called_off or result.status == plan_pb2.SOLVE_STATUS_INTERRUPTED
                state = plan_pb2.PLAN_STATE_CANCELLED if interrupted else plan_pb2.PLAN_STATE_READY
                return replace(record, state=state)
            if isinstance(outcome, CalledOff) or (isinstance(outcome, NoPlanFoundError) and is_called_off):
                return replace(record, state=plan_pb2.PLAN_STATE_CANCELLED)
            if isinstance(outcome, InfeasibleError):
                record.body.infeasible_reasons.extend(outcome.reasons)
                return replace(record, state=plan_pb2.PLAN_STATE_INFEASIBLE)
            record.body.failure.CopyFrom(_failure(outcome, posed))
            return replace(record, state=plan_pb2.PLAN_STATE_FAILED)

        await self._change(plan, change)

    async def _change(self, plan: str, change: Callable[[PlanRecord, Transaction], PlanRecord]) -> PlanRecord | None:
        """Change a record and publish it to watchers; retries while the store is unavailable."""

        def work(tx: Transaction) -> PlanRecord | None:
            record = tx.plans.get(plan)
            if record is None:  # its cluster was deleted
                forget_problem(tx, plan)
                return None
            return tx.plans.update(change(record, tx))

        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                record = await self._store.write(work)
                break
            except ServiceError as error:
                if error.reason == Reason.ERROR_REASON_NOT_LEADER:
                    raise  # the next planner resumes it
                _log.warning("%s: %s; trying again in %g s", plan, error, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        if record is not None:
            self._publish(record)
        return record


def _queued_again(record: PlanRecord, _tx: Transaction) -> PlanRecord:
    record.body.ClearField("solve_start_time")
    return replace(record, state=plan_pb2.PLAN_STATE_QUEUED)


def _failure(outcome: Outcome, posed: PosedProblem | None) -> failure_pb2.Failure:
    match outcome:
        case NoPlanFoundError():
            limit_s = posed.settings.time_limit_s if posed is not None else 0.0
            metadata = {"time_limit_s": f"{limit_s:g}"}
            error = ServiceError(Reason.ERROR_REASON_NO_PLAN_FOUND, str(outcome), metadata=metadata)
        case UncheckedPlanError(violations=violations):
            error = ServiceError(
                Reason.ERROR_REASON_PLAN_CHECK_FAILED,
                f"the plan violates {len(violations)} of its checks, which is a bug in hetis: "
                f"{'; '.join(violations[:5])}",
                metadata={"violations": len(violations)},
            )
        case InvalidProblemError():
            error = ServiceError(Reason.ERROR_REASON_INVALID_PROBLEM, str(outcome))
        case Crashed(exit_code, message):
            error = ServiceError(Reason.ERROR_REASON_SOLVER_CRASHED, message, metadata={"exit_code": exit_code})
        case _:
            raise AssertionError(f"{outcome} is no failure")
    return error.to_proto()


_IMPORTED = "plan.imported"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchableProblem:
    """A problem that is ready for the search."""

    problem: PosedProblem
    json: bytes


@dataclass(slots=True, eq=False)
class PlanCreation:
    """Creates plans, for callers and for the planner itself (`propose`)."""

    _store: Store
    _hubs: Hubs
    _fleet: LiveFleet
    _fleets: DeclaredFleets
    _pool: SolverPool
    _searches: PlanSearches
    _limits: SearchLimits = field(default_factory=SearchLimits)

    async def create(self, request: pb2.CreatePlanRequest) -> pb2.CreatePlanResponse:
        try:
            answer = await self._answer(request)
        except HetisError as error:  # the cluster or a profile is gone or has changed
            return await answered_before(self._store, request, pb2.CreatePlanResponse, error)
        return await self._make(request, answer)

    async def propose(
        self, cluster: str, spec: plan_pb2.PlanSpec | None, reason: str, *, found: Plan | None = None,
        gains: plan_pb2.TrafficProposal | None = None,
    ) -> str:  # fmt: skip
        """Create a plan for the planner itself because of ``reason``; return its name. Raises as `create` does.

        It is searched, unless it was ``found`` already; ``gains`` says what for.
        """
        request = pb2.CreatePlanRequest(plan=plan_pb2.Plan(cluster=cluster, spec=spec, traffic_proposal=gains))
        answer = await (self._answer(request) if found is None else self._imported(cluster, found, ""))
        return (await self._make(request, answer, proposal_reason=reason)).plan.name

    async def _answer(self, request: pb2.CreatePlanRequest) -> SearchableProblem | ImportedPlan:
        """Return the problem to be searched, or the imported plan. Raises an error if the request is invalid."""
        checks = Checks()
        if request.plan_id:
            checks.new_id("plan_id", request.plan_id)
        checks.request(request)
        checks.name("plan.cluster", request.plan.cluster, names.CLUSTER)
        check_labels(checks, request.plan.labels, "plan.labels")
        posed: PlacementRequest | None = None
        given: Plan | None = None
        match request.plan.WhichOneof("source"):
            case "spec":
                posed = await read_spec(checks, request.plan.spec, self._limits)
            case "imported":
                given = await checks.document(_IMPORTED, request.plan.imported, read_plan)
            case None:
                checks.require(False, SPEC, "is missing: send a spec to solve, or a plan to import")
        checks.raise_if_wrong()
        if posed is not None:
            return await self._posed(request.plan.cluster, request.plan.spec, posed)
        assert given is not None
        return await self._imported(request.plan.cluster, given, request.plan.imported.source_name)

    async def _posed(self, cluster: str, spec: plan_pb2.PlanSpec, request: PlacementRequest) -> SearchableProblem:
        def read(reader: Reader) -> tuple[ClusterRecord, list[str], list[ProfileRecord]]:
            record = reader.clusters.require(cluster)
            draining = [names.last_part(node.name) for node in reader.nodes.all(cluster=cluster, draining=True)]
            return record, draining, [reader.profiles.require(name) for name in spec.profiles]

        record, draining, named = await self._store.read(read)
        declared = await self._fleets.of(record)
        presence = self._fleet.presence_of(cluster).items()
        lost = (node for node, (state, _) in presence if state == cluster_pb2.NODE_STATE_LOST)
        left_out = frozenset(node for node in {*draining, *lost} if node in declared)
        gpus = list(gpu_types_of(declared.value))
        stored = await self._store.read(lambda reader: reader.profiles.all(gpu_type=frozenset(gpus)))
        profiles = choose_profiles(named, stored, gpus)

        def posed() -> SearchableProblem:
            problem = pose(spec, request, record, declared.value, left_out, profiles)
            return SearchableProblem(problem=problem, json=problem.to_json())

        return await run_in_thread_gc_paused(posed)

    async def _imported(self, cluster: str, plan: Plan, source_name: str) -> ImportedPlan:
        record = await self._store.require(Reader.clusters, cluster)
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

        def check(reader: Reader) -> None:
            reader.clusters.require(record.cluster)
            reader.plans.require_free(record.name)

        if request.validate_only:
            await self._store.read(check)
            undecided = without(basic_view(record), "state", "activation", "etag", "create_time")
            return pb2.CreatePlanResponse(plan=undecided)
        place = self._place(answer)

        is_begun = is_abandoned = False

        def insert(tx: Transaction) -> tuple[pb2.CreatePlanResponse, Publish]:
            check(tx)
            if isinstance(place, ServiceError):
                raise place
            made = tx.plans.insert(record)
            if isinstance(answer, ImportedPlan):
                tx.plan_documents.put(made.name, answer.document)
            else:
                assert place is not None
                tx.plan_documents.put(problem_name(made.name), answer.json)
                tx.plan_documents.put(caller_name(made.name), place.caller.encode())
            return pb2.CreatePlanResponse(plan=basic_view(made)), partial(begin, basic_view(made))

        async def begin(plan: plan_pb2.Plan) -> None:
            nonlocal is_begun
            self._hubs.plans.publish(record.name, plan, now_s=self._store.clock())
            if isinstance(answer, SearchableProblem) and isinstance(place, PooledSearch) and not is_begun:
                is_begun = True
                # The place was given up if it became known only later that the plan is stored.
                search = self._pool.reserve(place.caller, even_if_full=True) if is_abandoned else place
                self._searches.begin(record.name, search, answer.problem, answer.json)

        async def change() -> pb2.CreatePlanResponse:
            nonlocal is_abandoned
            try:
                return await change_once(self._store, request, pb2.CreatePlanResponse, insert)
            finally:
                if isinstance(place, PooledSearch) and not is_begun:
                    is_abandoned = True
                    place.abandon()

        return await to_the_end(change())

    def _place(self, answer: SearchableProblem | ImportedPlan) -> PooledSearch | ServiceError | None:
        """Reserve a place in the pool, or return the error why there is none.

        It is not raised, since a repeated request is answered even if the queue is full.
        """
        if isinstance(answer, ImportedPlan):
            return None
        try:
            return self._pool.reserve(present_caller().account)
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
        if proposal_reason and given.HasField("traffic_proposal"):
            body.traffic_proposal.CopyFrom(given.traffic_proposal)
        state = plan_pb2.PLAN_STATE_QUEUED
        if isinstance(answer, ImportedPlan):
            state = plan_pb2.PLAN_STATE_READY
            body.result.CopyFrom(result_to_proto(answer.plan, answer.document))
        if given.WhichOneof("source") == "imported":
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
            create_time_s=self._store.clock(),
        )
