"""Small plans for the demo's model: four layers, eight KV heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hetis.solver.plan import (
    AttentionWorkerPool,
    Objective,
    ObjectiveKind,
    Plan,
    ReplicaPlan,
    SolveResult,
    StagePlan,
    Status,
)


def plan_of(*stages: StagePlan, pools: tuple[AttentionWorkerPool, ...] = (), **changes: Any) -> Plan:
    replica = {
        "rate": 1.0,
        "ttft_s": 0.1,
        "tpot_s": 0.01,
        "micro_batch": 4,
        "in_flight": 1,
        "chunk_tokens": 32,
        "kv_tokens": 1000,
        "stages": stages,
        "attention_workers": pools,
    }
    result = SolveResult(
        status=Status.OPTIMAL, objective=ObjectiveKind.GOODPUT, value=1, bound=1, gap=0, unit="requests/s", solve_s=0
    )
    return Plan(
        strategy="hetis",
        family="replicas",
        result=result,
        objective=Objective(),
        replicas=(ReplicaPlan(**(replica | changes)),),
    )


def stage_of(**changes: Any) -> StagePlan:
    fields = {
        "gpu": "L4",
        "tp": 1,
        "copies": 1,
        "first_layer": 0,
        "num_layers": 4,
        "devices": ("a/0",),
        "kv_head_groups_kept": 2,
    }
    return StagePlan(**(fields | changes))


POOL = AttentionWorkerPool(stage=0, gpu="T4", devices=("b/0", "b/1"), kv_head_groups=6)


def sharing() -> Plan:
    """Two stages that keep two heads of eight, and two cards that hold the other six of both, in turn."""
    shared = tuple(replace(POOL, stage=stage, shared=True) for stage in (0, 1))
    return plan_of(stage_of(num_layers=3), stage_of(first_layer=3, num_layers=1, devices=("c/0",)), pools=shared)
