"""Handmade plans and requests on the small problems of `tests.solver.instances`, small enough to know the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hetis.simulator.values import Request
from hetis.solver.model import ModelSpec
from hetis.solver.plan import (
    AttentionWorkerPool,
    KvRoute,
    Objective,
    ObjectiveKind,
    Plan,
    ReplicaPlan,
    Role,
    SolveResult,
    StagePlan,
    Status,
)
from hetis.solver.problem import Assumptions, PlacementProblem
from hetis.solver.workload import Workload
from tests.solver.instances import FREE_FAMILY, make_model, make_node, make_problem, make_profile, make_workload


def small_problem(
    *,
    gpus: int = 8,
    model: ModelSpec | None = None,
    workload: Workload | None = None,
    usable_bytes: int = 60_000_000,
    block_tokens: int = 4,
    mixed_factor: float | None = None,
) -> PlacementProblem:
    """Return ``gpus`` single-card nodes ``big-0`` ... and as many slower ``small-0`` ..., in one zone.

    Its family has no engine, so that plans may have any numbers of micro-batches in flight and of copies.
    """
    return make_problem(
        [make_node("big", "big", nodes=gpus), make_node("small", "small", nodes=gpus)],
        profiles={
            "big": make_profile("big", usable_bytes=usable_bytes, mixed_factor=mixed_factor),
            "small": make_profile("small", flops=1e12, bytes_per_s=1e10, usable_bytes=usable_bytes),
        },
        model=model or make_model(),
        workload=workload or make_workload((24, 12)),
        family=FREE_FAMILY,
        assumptions=Assumptions(block_tokens=block_tokens),
    )


def pipeline(
    problem: PlacementProblem,
    *layers: int,
    copies: Sequence[int] = (),
    first: int = 0,
    micro_batch: int = 4,
    in_flight: int = 2,
    chunk_tokens: int = 32,
    pool: tuple[int, int] | None = None,
    role: Role = Role.UNIFIED,
    rate: float = 1.0,
) -> ReplicaPlan:
    """Return stages of these layers on cards from ``big-FIRST/0`` on; the first stage's ``pool`` is (cards, groups)."""
    stages, start, card = list[StagePlan](), 0, first
    groups = problem.model.head_groups
    for position, num in enumerate(layers):
        many = copies[position] if copies else 1
        kept = groups - (pool[1] if pool is not None and position == 0 else 0)
        stages.append(
            StagePlan(
                gpu="big",
                tp=1,
                copies=many,
                first_layer=start,
                num_layers=num,
                kv_head_groups_kept=kept,
                devices=tuple(f"big-{card + i}/0" for i in range(many)),
            )
        )
        start, card = start + num, card + many
    assert start == problem.model.num_layers
    pools: tuple[AttentionWorkerPool, ...] = ()
    if pool is not None:
        names = tuple(f"small-{first + i}/0" for i in range(pool[0]))
        pools = (AttentionWorkerPool(stage=0, gpu="small", devices=names, kv_head_groups=pool[1]),)
    return ReplicaPlan(
        rate=rate, ttft_s=0.1, tpot_s=0.01, micro_batch=micro_batch, in_flight=in_flight, chunk_tokens=chunk_tokens,
        kv_tokens=1000, stages=tuple(stages), attention_workers=pools, role=role,
    )  # fmt: skip


def plan_of(*replicas: ReplicaPlan, routes: tuple[KvRoute, ...] = ()) -> Plan:
    value = sum(replica.rate for replica in replicas)
    result = SolveResult(
        status=Status.FEASIBLE, objective=ObjectiveKind.GOODPUT, value=value, bound=value, gap=0.0, unit="requests/s",
        solve_s=0.0,
    )  # fmt: skip
    return Plan(
        strategy="by hand", family="by hand", result=result, objective=Objective(), replicas=replicas, kv_routes=routes
    )


def equal_requests(count: int, *, prompt: int, output: int, every_s: float = 0.0) -> list[Request]:
    return [Request(id=n, arrival_s=n * every_s, prompt_tokens=prompt, output_tokens=output) for n in range(count)]


def with_role(one: ReplicaPlan, role: Role) -> ReplicaPlan:
    """Return the replica with the same stages for prompts or for outputs only."""
    if role is Role.PREFILL:
        return replace(one, role=role, micro_batch=0, tpot_s=0.0, kv_zones=("default",))
    return replace(one, role=role, chunk_tokens=0, ttft_s=0.0)
