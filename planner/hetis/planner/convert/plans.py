"""Plans as messages: the result of a search, its progress, and the two views of the resource."""

from __future__ import annotations

import hashlib
import math

from hetis.planner.convert.replicas import replicas_to_proto
from hetis.planner.convert.roles import routes_to_proto
from hetis.solver.budget import Progress
from hetis.solver.plan import ClassPrice, Plan, Status
from hetis.v1 import document_pb2, plan_pb2

MOST_DOCUMENT_BYTES = 3 << 20  # for a document inside a message
# What a message of 4 MiB has room for besides the names and states of the surrounding answer.
MOST_PLAN_BYTES = (4 << 20) - (128 << 10)

_STATUSES = {
    Status.OPTIMAL: plan_pb2.SOLVE_STATUS_OPTIMAL,
    Status.FEASIBLE: plan_pb2.SOLVE_STATUS_FEASIBLE,
    Status.INTERRUPTED: plan_pb2.SOLVE_STATUS_INTERRUPTED,
}


def result_to_proto(plan: Plan, document: bytes) -> plan_pb2.PlanResult:
    """Return the result in the view BASIC. ``document`` is the plan in canonical JSON; the plan has replicas."""
    result = plan.result
    message = plan_pb2.PlanResult(
        status=_STATUSES[result.status],
        value=result.value,
        unit=result.unit,
        solve_s=result.solve_s,
        family=plan.family,
        num_replicas=len(plan.replicas),
        num_gpus=sum(len(replica.devices()) for replica in plan.replicas),
        num_attention_workers=sum(len(replica.worker_devices()) for replica in plan.replicas),
        document=document_pb2.Document(kind=document_pb2.DOCUMENT_KIND_PLAN, digest=digest_of(document)),
        document_bytes=len(document),
        notes=plan.notes,
    )
    if math.isfinite(result.bound):
        message.bound = result.bound
    if math.isfinite(result.gap):
        message.gap = result.gap
    return message


def complete(message: plan_pb2.Plan, plan: Plan, document: bytes) -> None:
    """Turn the view BASIC into FULL: add replicas, routes, prices and the document if the message has room.

    The document is the first to be left out, if it is large or there is no room: it can be read separately.
    """
    result = message.result
    result.prices.extend(map(price_to_proto, plan.prices))
    replicas = replicas_to_proto(plan.replicas, most_bytes=MOST_PLAN_BYTES - message.ByteSize())
    result.replicas.extend(replicas)
    result.replicas_truncated = len(replicas) < len(plan.replicas)
    routes = plan_pb2.PlanResult(kv_routes=routes_to_proto(plan.kv_routes))
    if routes.ByteSize() <= MOST_PLAN_BYTES - message.ByteSize():
        result.MergeFrom(routes)
    else:
        result.replicas_truncated = True
    if len(document) <= min(MOST_DOCUMENT_BYTES, MOST_PLAN_BYTES - message.ByteSize()):
        result.document.content = document


def without_contents(message: plan_pb2.Plan) -> plan_pb2.Plan:
    """Return the view BASIC of a caller's plan: documents without their contents."""
    basic = plan_pb2.Plan()
    basic.CopyFrom(message)
    match basic.WhichOneof("source"):
        case "imported":
            basic.imported.ClearField("content")
        case "spec":
            if basic.spec.HasField("model_document"):
                basic.spec.model_document.ClearField("content")
            if basic.spec.HasField("workload_document"):
                basic.spec.workload_document.ClearField("content")
    return basic


def progress_to_proto(progress: Progress, unit: str) -> plan_pb2.SolveProgress:
    return plan_pb2.SolveProgress(
        phase=progress.phase,
        elapsed_s=progress.elapsed_s,
        incumbent=progress.incumbent,
        bound=progress.bound,
        gap=progress.gap,
        unit=unit,
    )


def price_to_proto(price: ClassPrice) -> plan_pb2.ClassPrice:
    return plan_pb2.ClassPrice(
        gpu_type=price.gpu,
        zone=price.zone,
        gpus_per_node=price.gpus_per_node,
        available=price.available,
        used=price.used,
        as_attention_workers=price.as_attention_workers,
        dual=price.dual,
    )


def digest_of(document: bytes) -> str:
    """Return the ``Document.digest`` of a document in canonical JSON."""
    return f"sha256:{hashlib.sha256(document).hexdigest()}"
