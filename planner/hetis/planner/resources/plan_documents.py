"""Views of plans, and their documents: parsed, cached for a while, and checked if they were made elsewhere."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from hetis.engines.workers import why_no_workers
from hetis.formats.documents import from_data
from hetis.formats.errors import DocumentError, Problem
from hetis.planner.convert import documents
from hetis.planner.convert.names import word_of
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.jobs.searching import document_bytes
from hetis.planner.store import PlanRecord, Reader, Store
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.planner.use_cases.saved_plans import PlanAndProblem, problem_of_plan
from hetis.solver.check import check_plan
from hetis.solver.cluster import Cluster
from hetis.solver.plan import Plan, ReplicaPlan
from hetis.solver.problem import PlacementProblem
from hetis.v1 import document_pb2, failure_pb2, plan_pb2

SEARCHING = frozenset({plan_pb2.PLAN_STATE_QUEUED, plan_pb2.PLAN_STATE_SOLVING})


def is_settled(plan: plan_pb2.Plan) -> bool:
    """Return whether the plan can no longer change without a call.

    Then there is no search, and no replica is starting or draining.
    """
    if plan.state in SEARCHING or plan.activation == plan_pb2.ACTIVATION_STATE_ACTIVATING:
        return False
    if plan.activation == plan_pb2.ACTIVATION_STATE_INACTIVE:
        return True
    return not plan.activation_progress.num_draining and not plan.activation_progress.num_starting


_MOST_KEPT_BYTES = 64 << 20  # limit on the cached documents


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredPlan:
    """A plan with an answer, and the problem that it solves."""

    record: PlanRecord
    document: bytes
    found: PlanAndProblem

    @property
    def plan(self) -> Plan:
        return self.found.plan

    @property
    def problem(self) -> PlacementProblem:
        return self.found.problem


class PlanDocuments:
    """The documents of plans. They never change, so cached ones never become stale."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: OrderedDict[str, tuple[bytes, PlanAndProblem]] = OrderedDict()  # by digest

    async def answered(self, name: str) -> AnsweredPlan:
        """Return a plan that has an answer. Raises NOT_FOUND, or PLAN_STATE if it has none or cannot be read."""
        record = await self._store.read(lambda reader: reader.plans.require(name))
        require_answer(record)
        return await self.of(record)

    async def of(self, record: PlanRecord) -> AnsweredPlan:
        """Return the plan of a record, which must have an answer. Raises PLAN_STATE if its document cannot be read."""
        digest = record.body.result.document.digest
        if digest not in self._read:
            document = await self._store.read(lambda reader: _document(reader, record.name))
            try:
                self._read[digest] = document, await run_in_thread_gc_paused(_parsed, document, record.name)
            except DocumentError as error:
                raise plan_state(record, f"was made by {documents.of_another_version(error)}") from None
        self._read.move_to_end(digest)
        document, found = self._read[digest]
        while len(self._read) > 1 and sum(len(kept) for kept, _ in self._read.values()) > _MOST_KEPT_BYTES:
            self._read.popitem(last=False)
        return AnsweredPlan(record=record, document=document, found=found)


def require_answer(record: PlanRecord) -> None:
    """Check that the plan has an answer. Raises PLAN_STATE."""
    if not record.body.HasField("result"):
        raise plan_state(record, "has no answer" + (" yet" if record.state in SEARCHING else ""))


def plan_state(record: PlanRecord, what: str) -> ServiceError:
    """Return the error for a call in the wrong state; in the message ``what`` follows the plan's name and state."""
    state = word_of(plan_pb2.PlanState, record.state)
    message = f"{record.name} is {state} and {what}"
    return ServiceError(Reason.ERROR_REASON_PLAN_STATE, message, metadata={"name": record.name, "state": state})


def _document(reader: Reader, name: str) -> bytes:
    document = reader.plan_documents.get(name)
    if document is None:  # deleted in the meantime
        reader.plans.require(name)
        raise AssertionError(f"{name} has a result without a document")
    return document


def _parsed(document: bytes, name: str) -> PlanAndProblem:
    plan = from_data(json.loads(document), name=name)
    assert isinstance(plan, Plan)
    return problem_of_plan(plan, name)


MOST_VIOLATIONS = 20  # most violations in one message


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedPlan:
    """A plan that passed the checker, and its canonical JSON."""

    plan: Plan
    document: bytes


def read_plan(document: document_pb2.Document) -> Plan:
    """Return the plan in a document. Raises DocumentError with every problem of the document."""
    plan = documents.read_document(document, Plan)
    if not plan.replicas:
        name = document.source_name or "document"
        raise DocumentError([Problem(file=name, path="replicas", message="is empty: there is nothing to activate")])
    return plan


def checked(plan: Plan, name: str) -> ImportedPlan:
    """Return the plan if it solves the problem that it contains.

    Slow for large plans, so not for an event loop.

    Raises:
        DocumentError: the plan does not contain a problem, or has attention workers that its engine refuses.
        InvalidProblemError: the problem contradicts itself.
        ServiceError: PLAN_CHECK_FAILED.
    """
    problem = problem_of_plan(plan, name).problem
    rules, has_workers = problem.family.engine, any(replica.attention_workers for replica in plan.replicas)
    if rules is not None and has_workers and (why := why_no_workers(problem.model)):
        message = f"have attention workers, which {problem.model.name} cannot have with {rules.name}: {why}"
        raise DocumentError([Problem(file=name, path="replicas", message=message)])
    violations = check_plan(plan, problem)
    if violations:
        shown = [str(violation) for violation in violations[:MOST_VIOLATIONS]]
        if len(violations) > MOST_VIOLATIONS:
            shown.append(f"and {len(violations) - MOST_VIOLATIONS} more")
        message = f"the plan violates {len(violations)} rules of its own problem: {'; '.join(shown)}"
        raise ServiceError(Reason.ERROR_REASON_PLAN_CHECK_FAILED, message, metadata={"violations": len(violations)})
    return ImportedPlan(plan=plan, document=document_bytes(plan))


def require_gpus(name: str, cluster: Cluster, replicas: Iterable[ReplicaPlan]) -> None:
    """Check that the cluster called ``name`` has the replicas' GPUs.

    Slow for large fleets, so not for an event loop.

    Raises INVENTORY_MISMATCH, with every missing GPU.
    """
    there = {device.name: device.gpu for device in cluster.devices()}
    missing = [
        failure_pb2.FieldViolation(field=device, description=_what_is_wrong(device, part.gpu, there.get(device)))
        for replica in replicas
        for part in replica.parts()
        for device in part.devices
        if there.get(device) != part.gpu
    ]
    if missing:
        first = missing[0]
        raise ServiceError(
            Reason.ERROR_REASON_INVENTORY_MISMATCH,
            f"{name} lacks {len(missing)} GPUs that the plan uses; first: {first.description}",
            metadata={"cluster": name, "missing_gpus": len(missing)},
            violations=missing,
        )


def _what_is_wrong(device: str, planned: str, found: str | None) -> str:
    return f"{device} is missing" if found is None else f"{device} is {found}, the plan needs {planned}"
