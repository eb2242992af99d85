"""Plan files: the result of a placement, with its proof and its inputs.

JSON has no infinity, so ``null`` is written for missing numbers: for a value that is not a number, a bound that is
infinite (minus infinity for a minimised objective) and an infinite gap. Searches have a finite bound from the start, so
their plans have none of these, and the checker refuses them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from hetis.formats.errors import shown
from hetis.formats.fields import Document, DocumentPart, Found, Title, entries, listed, plain, value_of
from hetis.formats.kinds import kind_of
from hetis.solver.goals import GoalName
from hetis.solver.plan import LEAST_DEMAND_RPS, PLANNED_UTILISATION, Objective, Plan

Seconds = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Whole = Annotated[int, Field(ge=1)]
RoleName = Literal["unified", "prefill", "decode"]


class ResultPart(DocumentPart):
    """The quality of the plan; ``gap`` is ``|bound - value| / |value|``.

    ``utilisation`` is the share of the saturated rate that is served within the limits, the lanes how many replicas
    of a role share prompts, and ``prefill_load`` the utilisation of prefill replicas over that of the plan.
    """

    status: Literal["optimal", "feasible", "infeasible", "interrupted"]
    objective: GoalName
    value: float | None
    bound: float | None
    gap: Annotated[float, Field(ge=0)] | None
    unit: str
    solve_s: Seconds
    utilisation: Annotated[float, Field(ge=0, le=1)] = PLANNED_UTILISATION
    unified_lanes: Whole = 1
    prefill_lanes: Whole = 1
    prefill_load: Annotated[float, Field(gt=0, le=1)] = 1.0
    queued_ttft_s: Seconds | None = None


class ObjectivePart(DocumentPart):
    """The objective of the plan; a limit of null means no limit."""

    kind: GoalName
    ttft_limit_s: Annotated[float, Field(gt=0)] | None = None
    tpot_limit_s: Annotated[float, Field(gt=0)] | None = None
    demand_rps: Annotated[float, Field(ge=LEAST_DEMAND_RPS)] | None = None


class StagePart(DocumentPart):
    """``copies`` TP groups of ``tp`` GPUs; ``devices`` are ``node/index``, the groups of one copy after another."""

    gpu: str
    tp: Whole
    copies: Whole
    first_layer: Count
    num_layers: Count
    devices: Annotated[list[str], Field(min_length=1)]
    kv_head_groups_kept: Count


class PoolPart(DocumentPart):
    """Cards that hold KV and compute attention for one stage; head groups are counted per TP rank of the stage.

    Cards of a shared pool serve several stages of the replica in turn, and are listed in the pool of each stage.
    """

    stage: Count
    gpu: str
    devices: Annotated[list[str], Field(min_length=1)]
    kv_head_groups: Count
    shared: bool = False


class ReplicaPart(DocumentPart):
    """One replica: saturated rate in requests/s, p95 TTFT and mean TPOT in seconds.

    A prefill replica has no micro_batch and no tpot_s (both 0) and sends KV to decode replicas in kv_zones; a decode
    replica has no chunk_tokens and no ttft_s. With expert_parallel the copies of the one stage share their routed
    experts and iterate together, each with micro_batch requests and chunk_tokens of its own. max_num_seqs is how many
    requests its engine may run at once; 0: micro_batch × in_flight. It serves requests of its classes only; empty: all.
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
    max_num_seqs: Count = 0
    classes: list[str] = Field(default_factory=list)


class RoutePart(DocumentPart):
    """Requests/s whose KV is sent from one replica to another; replicas are counted from 0."""

    prefill: Count
    decode: Count
    rate: Annotated[float, Field(ge=0)]


class ClassSharePart(DocumentPart):
    """A class of requests by prompt length, the shortest first, and its share of all requests; the last has no bound.

    The router of the plan sends a request to a replica that serves its class.
    """

    name: Title
    share: Annotated[float, Field(gt=0, le=1)]
    max_prompt_tokens: Whole | None = None


class PricePart(DocumentPart):
    """A device class and the marginal value of one of its GPUs in the plan's relaxation."""

    gpu: str
    zone: str
    gpus_per_node: Whole
    available: Count
    used: Count
    as_attention_workers: Count
    dual: float


class RunnerUpPart(DocumentPart):
    """A shape of replica that was not chosen, and the reason."""

    shape: str
    rate: float
    reason: str


class PlanDocument(Document):
    """Replicas on named GPUs, with a proven bound on how much better a plan could be."""

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
    classes: list[ClassSharePart] = Field(default_factory=list)


def _to_plan(document: PlanDocument) -> Plan:
    result = document.result.model_dump()
    no_bound = math.inf if value_of(Objective, document.objective).maximises else -math.inf
    for name, missing in (("value", math.nan), ("bound", no_bound), ("gap", math.inf)):
        result[name] = missing if result[name] is None else result[name]
    return value_of(Plan, document, result=result, inputs=document.inputs)


def _plan_data(plan: Plan) -> dict[str, Any]:
    data = plain(replace(plan, inputs={}))
    for name in ("value", "bound", "gap"):
        if not math.isfinite(data["result"][name]):
            data["result"][name] = None
    return {name: data[name] for name in PlanDocument.model_fields if name in data} | {"inputs": dict(plan.inputs)}


def _check(data: Mapping[str, Any]) -> Found:
    yield from _check_inputs(data)
    # Batches or chunks of 0 are only valid for roles without them.
    for i, replica in entries(data.get("replicas")):
        role = replica.get("role", "unified")
        if replica.get("stages") == []:  # no reader of a plan could tell what such a replica holds, or where
            yield ("replicas", i, "stages"), "is empty, must have at least 1 stage"
        yield from _check_pools(replica, i)
        for name, lacks_it in (("micro_batch", "prefill"), ("chunk_tokens", "decode")):
            if replica.get(name) == 0 and role in ("unified", "prefill", "decode") and role != lacks_it:
                yield ("replicas", i, name), f"is 0, must be >= 1 on a {role} replica"
    yield from _check_routes(data)
    names = [one.get("name") for _, one in entries(data.get("classes"))]
    for i, replica in entries(data.get("replicas")):
        for j, name in enumerate(listed(replica.get("classes"))):
            if isinstance(name, str) and name not in names:
                yield ("replicas", i, "classes", j), f"{shown(name)} is no class of the plan"


def _check_routes(data: Mapping[str, Any]) -> Found:
    """Yield ends of routes that are no replica of the plan."""
    replicas = data.get("replicas")
    for i, route in entries(data.get("kv_routes")):
        for end in ("prefill", "decode"):
            number = route.get(end)
            if isinstance(replicas, list) and isinstance(number, int) and number >= len(replicas):
                has = f"replicas 0 to {len(replicas) - 1}" if replicas else "no replica"
                yield ("kv_routes", i, end), f"is {number}, the plan has {has}"


def _check_pools(replica: Mapping[str, Any], number: int) -> Found:
    """Yield pools of stages that a replica does not have: what their cards hold would be unknown."""
    stages = replica.get("stages")
    for i, pool in entries(replica.get("attention_workers")):
        stage = pool.get("stage")
        if isinstance(stages, list) and isinstance(stage, int) and stage >= len(stages) > 0:
            path = ("replicas", number, "attention_workers", i, "stage")
            yield path, f"is {stage}, the replica has stages 0 to {len(stages) - 1}"


def _check_inputs(data: Mapping[str, Any]) -> Found:
    """Yield problems with ``inputs``, which may hold anything but numbers that JSON cannot represent."""
    inputs = data.get("inputs")
    origins = inputs.get("origins") if isinstance(inputs, Mapping) else None
    if origins is not None and not isinstance(origins, Mapping):
        yield ("inputs", "origins"), f"is {shown(origins)}, must be a mapping"
    stack: list[tuple[tuple[str | int, ...], Any]] = [(("inputs",), inputs)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, float) and not math.isfinite(value):
            yield path, f"is {shown(value)}, must be finite"
        elif isinstance(value, dict):
            stack += [((*path, key), item) for key, item in value.items()]
        elif isinstance(value, list):
            stack += [((*path, i), item) for i, item in enumerate(value)]


PLAN = kind_of(PlanDocument, Plan, to_value=_to_plan, to_data=_plan_data, check=_check)
load_plan, parse_plan, plan_to_data = PLAN.load, PLAN.parse, PLAN.to_data
