"""Plans that were made elsewhere: checked like our own, and accepted only for this cluster's GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hetis.formats.errors import DocumentError, Problem
from hetis.planner.convert import documents
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.jobs.searching import document_bytes
from hetis.planner.use_cases.sources import problem_of_plan
from hetis.solver.check import check_plan
from hetis.solver.cluster import Cluster
from hetis.solver.plan import Plan, ReplicaPlan
from hetis.v1 import document_pb2, failure_pb2

MOST_VIOLATIONS = 20  # of the checker, in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedPlan:
    """A plan that passed the checker, and its canonical JSON."""

    plan: Plan
    document: bytes


def read_plan(document: document_pb2.Document) -> Plan:
    """Return the plan in a document.

    Raises:
        DocumentError: with every problem of the document.
    """
    plan = documents.read_document(document, "Plan")
    assert isinstance(plan, Plan)
    if not plan.replicas:
        name = document.source_name or "document"
        raise DocumentError([Problem(file=name, path="replicas", message="is empty: there is nothing to put in force")])
    return plan


def checked(plan: Plan, name: str) -> ImportedPlan:
    """Return the plan if it solves the problem that it contains. Slow for large plans: not for an event loop.

    Raises:
        DocumentError: it does not contain a problem.
        InvalidProblemError: the problem contradicts itself.
        ServiceError: PLAN_CHECK_FAILED.
    """
    violations = check_plan(plan, problem_of_plan(plan, name).problem)
    if violations:
        shown = [str(violation) for violation in violations[:MOST_VIOLATIONS]]
        if len(violations) > MOST_VIOLATIONS:
            shown.append(f"and {len(violations) - MOST_VIOLATIONS} more")
        raise ServiceError(
            Reason.ERROR_REASON_PLAN_CHECK_FAILED,
            f"the plan breaks its own problem in {len(violations)} ways: {'; '.join(shown)}",
            metadata={"violations": len(violations)},
        )
    return ImportedPlan(plan=plan, document=document_bytes(plan))


def require_gpus(name: str, cluster: Cluster, replicas: Iterable[ReplicaPlan]) -> None:
    """Check that the cluster called ``name`` has the replicas' GPUs. Slow for large fleets: not for an event loop.

    Raises:
        ServiceError: INVENTORY_MISMATCH, with every missing GPU.
    """
    there = {device.name: device.gpu for device in cluster.devices()}
    missing = [
        failure_pb2.FieldViolation(field=device, description=_what_is_wrong(device, gpu, there.get(device)))
        for replica in replicas
        for device, gpu in _uses(replica)
        if there.get(device) != gpu
    ]
    if missing:
        first = missing[0]
        raise ServiceError(
            Reason.ERROR_REASON_INVENTORY_MISMATCH,
            f"{name} lacks {len(missing)} GPUs that the plan uses; first: {first.description}",
            metadata={"cluster": name, "missing_gpus": len(missing)},
            violations=missing,
        )


def _uses(replica: ReplicaPlan) -> Iterable[tuple[str, str]]:
    for stage in replica.stages:
        yield from ((device, stage.gpu) for device in stage.devices)
    for pool in replica.attention_workers:
        yield from ((device, pool.gpu) for device in pool.devices)


def _what_is_wrong(device: str, planned: str, found: str | None) -> str:
    return f"{device} is not there" if found is None else f"{device} is {found}, the plan needs {planned}"
