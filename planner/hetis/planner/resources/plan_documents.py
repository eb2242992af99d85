"""Plans that were made elsewhere: read and checked; and whether a plan may still change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hetis.engines.workers import why_no_workers
from hetis.formats.errors import DocumentError, Problem
from hetis.planner.convert import documents
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.stored_plans import SEARCHING
from hetis.planner.jobs.searching import document_bytes
from hetis.planner.use_cases.saved_plans import problem_of_plan
from hetis.solver.check import check_plan
from hetis.solver.cluster import Cluster
from hetis.solver.plan import Plan, ReplicaPlan
from hetis.v1 import document_pb2, failure_pb2, plan_pb2


def is_settled(plan: plan_pb2.Plan) -> bool:
    """Return whether the plan can no longer change without a call.

    Then there is no search, and no replica is starting or draining.
    """
    if plan.state in SEARCHING or plan.activation == plan_pb2.ACTIVATION_STATE_ACTIVATING:
        return False
    if plan.activation == plan_pb2.ACTIVATION_STATE_INACTIVE:
        return True
    return not plan.activation_progress.num_draining and not plan.activation_progress.num_starting


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
