"""Plans as messages: objective, progress and result of a search, the two views of the resource, the explanation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

from hetis.planner.convert.replicas import replicas_to_proto
from hetis.planner.convert.roles import routes_to_proto
from hetis.planner.use_cases import place as placing
from hetis.solver.budget import Progress
from hetis.solver.explain import Explanation, IdleGpus, MemoryBar, StageTime
from hetis.solver.plan import ClassPrice, Objective, ObjectiveKind, Plan, RunnerUp, Status
from hetis.v1 import document_pb2, plan_pb2, plan_service_pb2

MOST_DOCUMENT_BYTES = 3 << 20  # for a document inside a message
# What a message of 4 MiB has room for besides the names and states of the surrounding answer.
MOST_PLAN_BYTES = (4 << 20) - (128 << 10)

_STATUSES = {
    Status.OPTIMAL: plan_pb2.SOLVE_STATUS_OPTIMAL,
    Status.FEASIBLE: plan_pb2.SOLVE_STATUS_FEASIBLE,
    Status.INTERRUPTED: plan_pb2.SOLVE_STATUS_INTERRUPTED,
}
Wrong = Callable[[str, str], object]  # called with the path of a wrong field, and what is wrong with it
_KINDS = {
    plan_pb2.OBJECTIVE_KIND_UNSPECIFIED: ObjectiveKind.GOODPUT,
    plan_pb2.OBJECTIVE_KIND_GOODPUT: ObjectiveKind.GOODPUT,
    plan_pb2.OBJECTIVE_KIND_THROUGHPUT: ObjectiveKind.THROUGHPUT,
    plan_pb2.OBJECTIVE_KIND_COST: ObjectiveKind.COST,
    plan_pb2.OBJECTIVE_KIND_GPUS: ObjectiveKind.GPUS,
}
_PRIMARY = "primary"


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


def objective_from_proto(message: plan_pb2.Objective, field: str, wrong: Wrong) -> Objective:
    """Return the objective; ``wrong`` is called for every wrong field, whose path begins with ``field``."""
    kind = _KINDS.get(message.kind, ObjectiveKind.GOODPUT)
    demand_rps = message.demand_rps or None
    if demand_rps is not None and not (demand_rps > 0 and math.isfinite(demand_rps)):
        wrong(f"{field}.demand_rps", f"is {demand_rps:g}, must be above 0 and finite")
    elif kind in (ObjectiveKind.COST, ObjectiveKind.GPUS) and demand_rps is None:
        wrong(f"{field}.demand_rps", f"is missing: the objective {kind.name} needs a demanded rate")
    return placing.objective(
        kind,
        ttft_s=_limit_s(message, "ttft", field, wrong),
        tpot_s=_limit_s(message, "tpot", field, wrong),
        demand_rps=demand_rps,
    )


def _limit_s(message: plan_pb2.Objective, name: str, field: str, wrong: Wrong) -> float | None:
    """Return a limit, infinity for no limit, or None for the default."""
    limit, unlimited = f"{name}_limit_s", f"{name}_unlimited"
    if message.HasField(unlimited):  # type: ignore[arg-type]  # the stubs list the names as a literal
        if not getattr(message, unlimited):
            wrong(f"{field}.{unlimited}", "is false, must be true where it is set")
        return math.inf
    if not message.HasField(limit):  # type: ignore[arg-type]
        return None
    seconds: float = getattr(message, limit)
    if not (seconds > 0 and math.isfinite(seconds)):
        wrong(f"{field}.{limit}", f"is {seconds:g}, must be above 0 and finite; {unlimited} lifts it")
        return None
    return seconds


def explanation_to_proto(plan: Plan, explanation: Explanation) -> plan_service_pb2.ExplainPlanResponse:
    return plan_service_pb2.ExplainPlanResponse(
        memory=map(_memory, explanation.memory),
        stage_times=map(_stage_time, explanation.stage_times),
        bottlenecks=explanation.bottlenecks,
        idle=map(_idle, explanation.idle),
        attention_workers=explanation.attention_workers,
        prices=map(price_to_proto, plan.prices),
        runners_up=map(_runner_up, plan.runners_up),
        notes=plan.notes,
        kv_routes=explanation.kv_routes,
    )


def _memory(bar: MemoryBar) -> plan_service_pb2.MemoryBar:
    return plan_service_pb2.MemoryBar(
        replica=bar.replica,
        stage=bar.stage,
        is_attention_worker=bar.role != _PRIMARY,
        gpu_type=bar.gpu,
        num_devices=bar.num_devices,
        nominal_bytes=bar.nominal_bytes,
        unusable_bytes=bar.unusable_bytes,
        reserve_bytes=bar.reserve_bytes,
        weight_bytes=bar.weight_bytes,
        kv_bytes=bar.kv_bytes,
        activation_bytes=bar.activation_bytes,
        free_bytes=max(0, bar.free_bytes),  # parts are rounded: a full card may exceed its size by some bytes
    )


def _stage_time(part: StageTime) -> plan_service_pb2.StageTime:
    return plan_service_pb2.StageTime(
        replica=part.replica,
        stage=part.stage,
        gpu_type=part.gpu,
        tp=part.tp,
        copies=part.copies,
        dense_s=part.dense_s,
        all_reduce_s=part.all_reduce_s,
        prefill_attention_s=part.prefill_attention_s,
        decode_attention_s=part.decode_attention_s,
        transfer_s=part.transfer_s,
        head_s=part.head_s,
        other_s=part.other_s,
        total_s=part.total_s,
        is_bottleneck=part.is_bottleneck,
        kv_wait_s=part.kv_wait_s,
        kv_wire_s=part.kv_wire_s,
    )


def _idle(idle: IdleGpus) -> plan_service_pb2.IdleGpus:
    return plan_service_pb2.IdleGpus(gpu_type=idle.gpu, zone=idle.zone, count=idle.count, reason=idle.reason)


def _runner_up(runner: RunnerUp) -> plan_service_pb2.RunnerUp:
    return plan_service_pb2.RunnerUp(shape=runner.shape, rate_rps=runner.rate, reason=runner.reason)
