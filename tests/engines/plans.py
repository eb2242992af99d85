"""Small plans for a model of four layers and eight KV heads of dimension 8."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hetis.engines.errors import LayoutError
from hetis.engines.layout import layout_of
from hetis.engines.versions import Engine
from hetis.formats.plan import plan_to_data
from hetis.solver.model import ModelSpec
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
from tests.models import model_of, replace, shape_of

MODEL = model_of(
    name="tiny",
    num_layers=4,
    hidden=128,
    intermediate=256,
    q_heads=16,
    kv_heads=8,
    head_dim=8,
    vocab=512,
)
WITH_EXPERTS = replace(MODEL, moe=shape_of(num_experts=8, active_experts=2, expert_intermediate=64, shared_experts=1))
PAGES = 63  # pages of each KV head: 1,000 tokens
LAYER_BYTES = PAGES * 2 * 16 * 8 * 2  # bytes of one KV head in one layer: K and V of 16 tokens of 8 numbers of 2 bytes


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


def ranks_of(tp: int, node: str = "a", **changes: Any) -> StagePlan:
    """Return a stage on as many GPUs of a node as it has ranks."""
    return stage_of(tp=tp, devices=tuple(f"{node}/{i}" for i in range(tp)), **changes)


def stages_of(*layers: int, **changes: Any) -> tuple[StagePlan, ...]:
    """Return stages of so many layers, each on a GPU of a."""
    firsts = itertools.accumulate(layers, initial=0)
    return tuple(
        stage_of(first_layer=first, num_layers=count, devices=(f"a/{i}",), **changes)
        for i, (first, count) in enumerate(zip(firsts, layers, strict=False))
    )


ALONE = plan_of(stage_of(kv_head_groups_kept=8))
POOL = AttentionWorkerPool(stage=0, gpu="T4", devices=("b/0", "b/1"), kv_head_groups=6)


def sharing() -> Plan:
    """Return two stages that keep two heads of eight, and two GPUs that hold the other six of each in turn."""
    shared = tuple(replace(POOL, stage=stage, shared=True) for stage in (0, 1))
    return plan_of(stage_of(num_layers=3), stage_of(first_layer=3, num_layers=1, devices=("c/0",)), pools=shared)


def sharing_experts() -> Plan:
    """Return two copies of two ranks on a that share their experts, for `WITH_EXPERTS`."""
    four = stage_of(tp=2, copies=2, devices=("a/0", "a/1", "a/2", "a/3"), kv_head_groups_kept=4)
    return plan_of(four, in_flight=2, micro_batch=4, chunk_tokens=32, kv_tokens=2048, expert_parallel=True)


def staged() -> Plan:
    """Return two ranks on a with a worker on b, then two ranks on c with a worker next to them."""
    return plan_of(
        stage_of(num_layers=3, tp=2, devices=("a/0", "a/1"), kv_head_groups_kept=1),
        stage_of(first_layer=3, num_layers=1, tp=2, devices=("c/2", "c/3"), kv_head_groups_kept=2),
        pools=(
            AttentionWorkerPool(stage=0, gpu="T4", devices=("b/0",), kv_head_groups=3),
            AttentionWorkerPool(stage=1, gpu="T4", devices=("c/4",), kv_head_groups=2),
        ),
    )


def refused(
    plan: Plan, model: ModelSpec = MODEL, *, replica: int = 0, engine: Engine = Engine.VLLM_HETIS
) -> tuple[str, ...]:
    """Return why the engine cannot run the replica."""
    with pytest.raises(LayoutError) as caught:
        layout_of(plan, replica, model, engine=engine)
    return caught.value.messages


def write_plan(folder: Path, plan: Plan | None = None) -> Path:
    """Write a plan; by default a/0 keeps two KV heads of eight, and b/0 and b/1 have three each."""
    path = folder / "plan.json"
    plan = plan or plan_of(stage_of(), pools=(POOL,))
    path.write_text(json.dumps(plan_to_data(plan)), encoding="utf-8")
    return path


FP8_KV = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}


def write_config(folder: Path, quantisation: Mapping[str, str] | None = None) -> Path:
    """Write the folder of a model, with its configuration alone."""
    (folder / "config.json").parent.mkdir(parents=True, exist_ok=True)
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "torch_dtype": "float32",
    }
    if quantisation is not None:
        config["quantization_config"] = quantisation
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
