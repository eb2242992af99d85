"""Messages for plans, their replicas, routes and roles, and back; the two views of a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.message import Message

from hetis.engines.gpus import kind_of_type
from hetis.engines.planned import kv_partners, limits_blocks, seats_limit_of, utilisation_of
from hetis.formats.files import content_digest
from hetis.planner.use_cases.record.parts import Verified
from hetis.planner.use_cases.request import objective
from hetis.planner.use_cases.verification.outcome import misses
from hetis.solver.budget import Progress
from hetis.solver.cluster import GpuType
from hetis.solver.plan import (
    LEAST_DEMAND_RPS,
    AttentionWorkerPool,
    Objective,
    ObjectiveKind,
    Plan,
    ReplicaPlan,
    Role,
    StagePlan,
)
from hetis.v1 import document_pb2, plan_pb2, replica_pb2

TO_PROTO = {role: replica_pb2.ReplicaRole.Value(f"REPLICA_ROLE_{role.name}") for role in Role}
FROM_PROTO = {value: role for role, value in TO_PROTO.items()}


def role_of(shape: replica_pb2.ReplicaPlan) -> Role:
    """Return the role of a replica; unified if it was written before roles existed."""
    return FROM_PROTO.get(shape.role, Role.UNIFIED)


def kv_partners_to_proto(plan: Plan) -> list[list[replica_pb2.KvPartner]]:
    """Return for each replica the kinds of replicas that it exchanges KV with (`hetis.engines.layout.kv_partners`)."""
    return [
        [replica_pb2.KvPartner(role=TO_PROTO[one.role], gpu_types=one.gpus, tp=one.tp) for one in partners]
        for partners in kv_partners(plan)
    ]


def gpu_kinds_to_proto(
    replica: ReplicaPlan, partners: Iterable[replica_pb2.KvPartner], types: Mapping[str, GpuType]
) -> list[replica_pb2.GpuKind]:
    """Return what engines must know about the GPU types of a replica and its partners; ``types`` are by name."""
    names = [stage.gpu for stage in replica.stages] + [pool.gpu for pool in replica.attention_workers]
    names += [name for partner in partners for name in partner.gpu_types]
    kinds = {name: kind_of_type(types[name]) for name in names}
    return [
        replica_pb2.GpuKind(gpu_type=name, vendor=kind.vendor, compute_capability=kind.capability or 0.0)
        for name, kind in kinds.items()
    ]


_RENAMED = {"gpu": "gpu_type", "rate": "rate_rps"}  # names in the API of fields of the solver's values
M = TypeVar("M", bound=Message)
V = TypeVar("V")


def message_of(kind: type[M], value: Any, /, **others: Any) -> M:
    """Return a message of ``kind`` with the fields that it shares with ``value``, a dataclass, and with ``others``."""
    given = {_RENAMED.get(field.name, field.name): getattr(value, field.name) for field in fields(value)} | others
    return kind(**{name: given[name] for name in kind.DESCRIPTOR.fields_by_name if name in given})


def value_from(kind: type[V], message: Message, /, **others: Any) -> V:
    """Return a dataclass of ``kind`` with the fields of a message, and with ``others``, which the message lacks."""
    names = [field.name for field in fields(kind) if field.name not in others]  # type: ignore[arg-type]
    given = {name: getattr(message, _RENAMED.get(name, name)) for name in names}
    return kind(
        **{name: one if isinstance(one, int | float | str) else tuple(one) for name, one in given.items()}, **others
    )


def _messages(kind: type[M], values: Iterable[Any]) -> list[M]:
    return [message_of(kind, value) for value in values]


MOST_IN_A_MESSAGE = 1000  # replicas in a PlanResult, as plan.proto documents


def replicas_to_proto(plan: Plan, *, most_bytes: int) -> list[replica_pb2.ReplicaPlan]:
    """Return the first replicas: as many as a message may have and as fit into ``most_bytes``."""
    messages: list[replica_pb2.ReplicaPlan] = []
    for replica in plan.replicas:
        message = replica_to_proto(replica, plan)
        most_bytes -= message.ByteSize()
        if len(messages) == MOST_IN_A_MESSAGE or most_bytes < 0:
            break
        messages.append(message)
    return messages


def replica_to_proto(replica: ReplicaPlan, plan: Plan) -> replica_pb2.ReplicaPlan:
    """Return a replica of the plan."""
    return message_of(
        replica_pb2.ReplicaPlan,
        replica,
        stages=_messages(replica_pb2.StagePlan, replica.stages),
        attention_workers=_messages(replica_pb2.AttentionWorkerPool, replica.attention_workers),
        role=TO_PROTO[replica.role],
        seats_limit=seats_limit_of(replica, plan),
        gpu_memory_utilization=utilisation_of(replica, plan) or 0.0,
        kv_blocks_limited=limits_blocks(replica, plan),
    )


def replica_from_proto(message: replica_pb2.ReplicaPlan) -> ReplicaPlan:
    return value_from(
        ReplicaPlan,
        message,
        stages=tuple(value_from(StagePlan, stage) for stage in message.stages),
        attention_workers=tuple(value_from(AttentionWorkerPool, pool) for pool in message.attention_workers),
        role=role_of(message),
    )


MOST_DOCUMENT_BYTES = 3 << 20  # limit on a document inside a message
# The room in a message of 4 MiB, less the names and states of the surrounding answer.
MOST_PLAN_BYTES = (4 << 20) - (128 << 10)

Wrong = Callable[[str, str], object]  # called with the path of a wrong field, and with what is wrong
OBJECTIVE_KINDS = {kind: plan_pb2.ObjectiveKind.Value(f"OBJECTIVE_KIND_{kind.name}") for kind in ObjectiveKind}
_KIND_OF = {number: kind for kind, number in OBJECTIVE_KINDS.items()}


def result_to_proto(plan: Plan, document: bytes) -> plan_pb2.PlanResult:
    """Return the result in the view BASIC. ``document`` is the plan in canonical JSON; the plan has replicas."""
    result = plan.result
    message = plan_pb2.PlanResult(
        status=plan_pb2.SolveStatus.Value(f"SOLVE_STATUS_{result.status.name}"),
        value=result.value,
        unit=result.unit,
        solve_s=result.solve_s,
        family=plan.family,
        num_replicas=len(plan.replicas),
        num_gpus=sum(len(replica.devices()) for replica in plan.replicas),
        num_attention_workers=sum(len(replica.worker_devices()) for replica in plan.replicas),
        document=document_pb2.Document(kind=document_pb2.DOCUMENT_KIND_PLAN, digest=content_digest(document)),
        document_bytes=len(document),
        notes=plan.notes,
    )
    if math.isfinite(result.bound):
        message.bound = result.bound
    if math.isfinite(result.gap):
        message.gap = result.gap
    if (verification := _verification(plan)) is not None:
        message.verification.CopyFrom(verification)
    return message


def _verification(plan: Plan) -> plan_pb2.Verification | None:
    found = Verified.of(plan).verification
    try:
        return None if found is None else message_of(plan_pb2.Verification, found, misses=misses(found, plan))
    except (TypeError, ValueError, ArithmeticError):  # an imported plan may contain any values
        return None


def complete(message: plan_pb2.Plan, plan: Plan, document: bytes) -> None:
    """Turn the view BASIC into FULL: add replicas, routes, prices and the document if the message has room.

    The document is the first to be left out, if it is large or there is no room: it can be read separately.
    """
    result = message.result
    result.prices.extend(_messages(plan_pb2.ClassPrice, plan.prices))
    replicas = replicas_to_proto(plan, most_bytes=MOST_PLAN_BYTES - message.ByteSize())
    result.replicas.extend(replicas)
    result.replicas_truncated = len(replicas) < len(plan.replicas)
    routes = plan_pb2.PlanResult(kv_routes=_messages(replica_pb2.KvRoute, plan.kv_routes))
    if routes.ByteSize() <= MOST_PLAN_BYTES - message.ByteSize():
        result.MergeFrom(routes)
    else:
        result.replicas_truncated = True
    if len(document) <= min(MOST_DOCUMENT_BYTES, MOST_PLAN_BYTES - message.ByteSize()):
        result.document.content = document


def without_contents(message: plan_pb2.Plan) -> plan_pb2.Plan:
    """Return a caller's plan in the view BASIC: documents without their contents."""
    basic = deepcopy(message)
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
    return message_of(plan_pb2.SolveProgress, progress, unit=unit)


def objective_from_proto(message: plan_pb2.Objective, field: str, wrong: Wrong) -> Objective:
    """Return the objective; ``wrong`` is called for every wrong field, whose path begins with ``field``."""
    if message.kind and message.kind not in _KIND_OF:
        known = ", ".join(one.name for one in ObjectiveKind)
        wrong(f"{field}.kind", f"is {message.kind}, must be one of {known}")
    kind = _KIND_OF.get(message.kind, ObjectiveKind.GOODPUT)
    demand_rps = message.demand_rps or None
    if demand_rps is not None and not (demand_rps > 0 and math.isfinite(demand_rps)):
        wrong(f"{field}.demand_rps", f"is {demand_rps:g}, must be above 0 and finite")
        demand_rps = None  # treated as if it was absent
    elif demand_rps is not None and demand_rps < LEAST_DEMAND_RPS:
        wrong(f"{field}.demand_rps", f"is {demand_rps:g}, must be at least {LEAST_DEMAND_RPS:g}")
        demand_rps = None
    elif kind.goal.needs_demand and demand_rps is None:
        wrong(f"{field}.demand_rps", f"is missing: the objective {kind.name} needs a demanded rate")
    return objective(
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
            wrong(f"{field}.{unlimited}", "is false, must be true or left unset")
        return math.inf
    if not message.HasField(limit):  # type: ignore[arg-type]
        return None
    seconds: float = getattr(message, limit)
    if not (seconds > 0 and math.isfinite(seconds)):
        wrong(f"{field}.{limit}", f"is {seconds:g}, must be above 0 and finite; {unlimited} lifts it")
        return None
    return seconds
