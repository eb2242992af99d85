"""Plan files: the result of a placement, with its proof and its inputs.

JSON has no infinity, so ``null`` is written for missing numbers. A plan without replicas has ``value: null`` (not a
number); without a proof it has ``bound: null`` (infinity, or minus infinity for a minimised objective) and
``gap: null`` (infinity).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from hetis.formats.errors import shown
from hetis.formats.fields import API_VERSION, DocumentPart, Title
from hetis.formats.loading import read_data, validated
from hetis.formats.positions import Text
from hetis.solver.plan import (
    AttentionWorkerPool,
    ClassPrice,
    KvRoute,
    Objective,
    ObjectiveKind,
    Plan,
    ReplicaPlan,
    Role,
    RunnerUp,
    SolveResult,
    StagePlan,
    Status,
)

Seconds = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Whole = Annotated[int, Field(ge=1)]
ObjectiveName = Literal["goodput", "throughput", "cost", "gpus"]
RoleName = Literal["unified", "prefill", "decode"]


class ResultPart(DocumentPart):
    """How good the plan is; ``gap`` is ``|bound - value| / |value|``."""

    status: Literal["optimal", "feasible", "infeasible", "interrupted"]
    objective: ObjectiveName
    value: float | None
    bound: float | None
    gap: Annotated[float, Field(ge=0)] | None
    unit: str
    solve_s: Seconds


class ObjectivePart(DocumentPart):
    """What the plan is good for; a limit of null is lifted."""

    kind: ObjectiveName
    ttft_limit_s: Annotated[float, Field(gt=0)] | None = None
    tpot_limit_s: Annotated[float, Field(gt=0)] | None = None
    demand_rps: Annotated[float, Field(gt=0)] | None = None


class StagePart(DocumentPart):
    """``copies`` TP groups of ``tp`` GPUs; ``devices`` are ``node/index``, the groups of one copy after another."""

    gpu: str
    tp: Whole
    copies: Whole
    first_layer: Count
    num_layers: Count
    devices: list[str]
    kv_head_groups_kept: Count


class PoolPart(DocumentPart):
    """Cards that hold KV and compute attention for one stage; head groups count per TP rank of the stage.

    Cards of a shared pool serve several stages of the replica in turn and are listed in the pool of each.
    """

    stage: Count
    gpu: str
    devices: list[str]
    kv_head_groups: Count
    shared: bool = False


class ReplicaPart(DocumentPart):
    """One replica: saturated rate in requests/s, p95 TTFT and mean TPOT in seconds.

    A prefill replica has no micro_batch and no tpot_s (both 0) and sends KV to decode replicas in kv_zones; a decode
    replica has no chunk_tokens and no ttft_s. With expert_parallel the copies of the one stage share their routed
    experts and iterate together, each with micro_batch requests and chunk_tokens of its own.
    """

    rate: Annotated[float, Field(ge=0)]
    ttft_s: Seconds
    tpot_s: Seconds
    micro_batch: Count
    in_flight: Whole
    chunk_tokens: Count
    kv_tokens: Count
    stages: list[StagePart]
    attention_workers: list[PoolPart] = Field(default_factory=list)
    role: RoleName = "unified"
    expert_parallel: bool = False
    kv_zones: list[str] = Field(default_factory=list)


class RoutePart(DocumentPart):
    """Requests/s whose KV goes from one replica to another; both are counted from 0."""

    prefill: Count
    decode: Count
    rate: Annotated[float, Field(ge=0)]


class PricePart(DocumentPart):
    """A device class and what one GPU of it is worth at the margin of the plan's relaxation."""

    gpu: str
    zone: str
    gpus_per_node: Whole
    available: Count
    used: Count
    as_attention_workers: Count
    dual: float


class RunnerUpPart(DocumentPart):
    """A shape of replica that was not chosen, and why."""

    shape: str
    rate: float
    reason: str


class PlanDocument(DocumentPart):
    """Replicas on named GPUs with a proof of how good they are."""

    api_version: Annotated[Literal["hetis/v1"], Field(alias="apiVersion")]
    kind: Literal["Plan"]
    strategy: Title
    family: str
    result: ResultPart
    objective: ObjectivePart
    inputs: dict[str, Any] = Field(default_factory=dict)
    replicas: list[ReplicaPart]
    kv_routes: list[RoutePart] = Field(default_factory=list)
    prices: list[PricePart] = Field(default_factory=list)
    runners_up: list[RunnerUpPart] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Return the plan in a YAML or JSON file (``-``: standard input). Only its form is checked; ``check_plan`` checks
    claims.

    Raises:
        DocumentError: with every problem of the file.
    """
    return parse_plan(*read_data(path))


def parse_plan(data: Any, source: Text) -> Plan:
    """Return the plan in a document's plain data.

    Raises:
        DocumentError: with every problem of the document.
    """
    return validated(PlanDocument, data, source, to_value=_to_plan, check=_check)


def plan_to_data(plan: Plan) -> dict[str, Any]:
    """Return a plan's document as plain data. Reading it again gives an equal plan."""
    result, objective = plan.result, plan.objective
    return {
        "apiVersion": API_VERSION,
        "kind": "Plan",
        "strategy": plan.strategy,
        "family": plan.family,
        "result": {
            "status": result.status.value,
            "objective": result.objective.value,
            "value": _finite(result.value),
            "bound": _finite(result.bound),
            "gap": _finite(result.gap),
            "unit": result.unit,
            "solve_s": result.solve_s,
        },
        "objective": {
            "kind": objective.kind.value,
            "ttft_limit_s": objective.ttft_limit_s,
            "tpot_limit_s": objective.tpot_limit_s,
            "demand_rps": objective.demand_rps,
        },
        "inputs": dict(plan.inputs),
        "replicas": [_replica_data(replica) for replica in plan.replicas],
        "kv_routes": [_fields(route, RoutePart) for route in plan.kv_routes],
        "prices": [_fields(price, PricePart) for price in plan.prices],
        "runners_up": [_fields(runner, RunnerUpPart) for runner in plan.runners_up],
        "notes": list(plan.notes),
    }


def _check(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    yield from _check_inputs(data)
    yield from _check_sizes(data)


def _check_inputs(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield problems with ``inputs``, which may hold anything but numbers that JSON cannot represent."""
    stack: list[tuple[tuple[str | int, ...], Any]] = [(("inputs",), data.get("inputs"))]
    while stack:
        path, value = stack.pop()
        if isinstance(value, float) and not math.isfinite(value):
            yield path, f"is {shown(value)}, must be finite"
        elif isinstance(value, dict):
            stack += [((*path, key), item) for key, item in value.items()]
        elif isinstance(value, list):
            stack += [((*path, i), item) for i, item in enumerate(value)]


def _check_sizes(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield problems with batches or chunks of 0, which are only valid for roles without them."""
    replicas = data.get("replicas")
    for i, replica in enumerate(replicas if isinstance(replicas, list) else []):
        if not isinstance(replica, dict):
            continue
        role = replica.get("role", "unified")
        for name, lacks_it in (("micro_batch", "prefill"), ("chunk_tokens", "decode")):
            if replica.get(name) == 0 and role in ("unified", "prefill", "decode") and role != lacks_it:
                yield ("replicas", i, name), f"is 0, must be >= 1 on a {role} replica"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _fields(value: object, part: type[DocumentPart]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in part.model_fields}


def _replica_data(replica: ReplicaPlan) -> dict[str, Any]:
    data = _fields(replica, ReplicaPart)
    data["stages"] = [_fields(s, StagePart) | {"devices": list(s.devices)} for s in replica.stages]
    data["attention_workers"] = [_fields(p, PoolPart) | {"devices": list(p.devices)} for p in replica.attention_workers]
    return data | {"role": replica.role.value, "kv_zones": list(replica.kv_zones)}


def _to_plan(document: PlanDocument) -> Plan:
    result, limits = document.result, document.objective
    objective = Objective(
        kind=ObjectiveKind(limits.kind),
        ttft_limit_s=limits.ttft_limit_s,
        tpot_limit_s=limits.tpot_limit_s,
        demand_rps=limits.demand_rps,
    )
    no_bound = math.inf if objective.maximises else -math.inf
    return Plan(
        strategy=document.strategy,
        family=document.family,
        result=SolveResult(
            status=Status(result.status),
            objective=ObjectiveKind(result.objective),
            value=math.nan if result.value is None else result.value,
            bound=no_bound if result.bound is None else result.bound,
            gap=math.inf if result.gap is None else result.gap,
            unit=result.unit,
            solve_s=result.solve_s,
        ),
        objective=objective,
        replicas=tuple(_to_replica(part) for part in document.replicas),
        kv_routes=tuple(KvRoute(**dict(part)) for part in document.kv_routes),
        prices=tuple(ClassPrice(**dict(part)) for part in document.prices),
        runners_up=tuple(RunnerUp(**dict(part)) for part in document.runners_up),
        notes=tuple(document.notes),
        inputs=document.inputs,
    )


def _to_replica(part: ReplicaPart) -> ReplicaPlan:
    stages = tuple(StagePlan(**(dict(stage) | {"devices": tuple(stage.devices)})) for stage in part.stages)
    pools = tuple(AttentionWorkerPool(**(dict(p) | {"devices": tuple(p.devices)})) for p in part.attention_workers)
    parts = {"stages": stages, "attention_workers": pools, "role": Role(part.role), "kv_zones": tuple(part.kv_zones)}
    return ReplicaPlan(**(dict(part) | parts))
