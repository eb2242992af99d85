"""Each reason why an engine does not run a replica is reported separately."""

from __future__ import annotations

from typing import Any

import pytest

from hetis.solver.check.replica_shapes import Fleet
from hetis.solver.check.structure import check_engine
from hetis.solver.check.violation import Rule, at
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.model import DraftShape, GpuPrecision
from hetis.solver.placement.families import run_by
from hetis.solver.plan import AttentionWorkerPool, ReplicaPlan, Role, StagePlan
from hetis.solver.problem import PlacementProblem
from tests.models import replace, shape_of
from tests.solver.claimed_plans import unclaimed
from tests.solver.instances import make_compressed, make_model, make_node, make_problem

FAMILY = Family(max_pool=2, tp_sizes=(1, 2), micro_batches=(4,), in_flight=(1, 2, 3), chunk_tokens=(64,))
FIRST = StagePlan(gpu="A", tp=1, copies=1, first_layer=0, num_layers=3, devices=("a-0/0",), kv_head_groups_kept=1)
SECOND = replace(FIRST, first_layer=3, devices=("a-1/0",))
WORKERS = AttentionWorkerPool(stage=0, gpu="B", devices=("b-0/0",), kv_head_groups=1)
MORE_WORKERS = replace(WORKERS, stage=1, devices=("b-1/0",))


def the_problem(**rules: Any) -> PlacementProblem:
    """Two nodes of two A and two of one B in the east, one A in the west."""
    nodes = [
        make_node("a", "A", gpus=2, nodes=2, zone="east"),
        make_node("b", "B", nodes=2, zone="east"),
        make_node("w", "A", zone="west"),
    ]
    engine = EngineRules(**{"name": "vllm-hetis", "max_stages": 2, "max_pooled_stages": 2} | rules)
    model = make_model(num_layers=6, kv_heads=2)
    return make_problem(nodes, model=model, family=run_by(FAMILY, engine))


PIPELINE = unclaimed(FIRST, SECOND, in_flight=2)
POOLED = unclaimed(FIRST, SECOND, pools=(WORKERS, MORE_WORKERS), in_flight=2)


def messages(replica: ReplicaPlan, problem: PlacementProblem) -> list[str]:
    found = at("replica 0", check_engine(replica, problem, Fleet.of(problem.cluster)))
    assert {(violation.rule, violation.where) for violation in found} <= {(Rule.ENGINE, "replica 0")}
    assert all(violation.message.endswith(" (vllm-hetis)") for violation in found)
    return [violation.message.removesuffix(" (vllm-hetis)") for violation in found]


@pytest.mark.parametrize("replica", [PIPELINE, POOLED, unclaimed(replace(FIRST, num_layers=6), in_flight=1)])
def test_what_an_engine_runs_up_to_its_limits_is_sound(replica: ReplicaPlan) -> None:
    assert messages(replica, the_problem()) == []
    assert messages(replica, the_problem(max_gpus=4, max_nodes=4, min_layers=3)) == []
    any_engine = replace(the_problem(), family=FAMILY)
    assert list(check_engine(replica, any_engine, Fleet.of(any_engine.cluster))) == []


BROKEN: list[tuple[ReplicaPlan, dict[str, Any], str]] = [
    (PIPELINE, {"max_stages": 1, "max_pooled_stages": 1}, "has 2 stages, may have 1"),
    (
        replace(PIPELINE, stages=(replace(FIRST, tp=2, devices=("a-0/0", "a-0/1")), SECOND)),
        {},
        "has stages of TP 1, 2, must have one TP size",
    ),
    (replace(PIPELINE, stages=(replace(FIRST, copies=2, devices=("a-0/0", "a-0/1")), SECOND)), {},
     "has stages with copies"),
    (replace(PIPELINE, in_flight=1), {}, "has 1 micro-batches in flight, must have one for each of its 2 stages"),
    (replace(PIPELINE, in_flight=3), {}, "has 3 micro-batches in flight, must have one for each of its 2 stages"),
    (PIPELINE, {"max_gpus": 1}, "has 2 GPUs, may have 1"),
    (POOLED, {"max_gpus": 3}, "has 4 GPUs, may have 3"),
    (PIPELINE, {"min_layers": 4}, "has a stage of 3 layers, must have at least 4 in each"),
    (PIPELINE, {"max_nodes": 1}, "lies on 2 nodes (a-0, a-1), may lie on 1"),
    (
        replace(PIPELINE, stages=(FIRST, replace(SECOND, devices=("w/0",)))),
        {},
        "lies in 2 zones (east, west), must lie in 1",
    ),
    (POOLED, {"max_pooled_stages": 1}, "has attention workers at 2 stages, may have them at 1"),
    (replace(POOLED, role=Role.DECODE), {"max_stages": 2}, "has attention workers and is to decode only"),
    (
        replace(POOLED, attention_workers=(MORE_WORKERS,)),
        {},
        "has attention workers at some stages, must have them at all or none",
    ),
    (
        replace(POOLED, attention_workers=(replace(WORKERS, devices=("b-0/0", "a-0/1")), MORE_WORKERS)),
        {},
        "has attention workers of different numbers at its stages: 1, 2",
    ),
    (
        replace(POOLED, attention_workers=(replace(WORKERS, gpu="A", devices=("a-0/1",)), MORE_WORKERS)),
        {},
        "has attention workers of different GPU types at its stages: A, B",
    ),
    (
        replace(POOLED, attention_workers=(replace(WORKERS, kv_head_groups=2), MORE_WORKERS)),
        {},
        "has attention workers of different head groups at its stages: 1, 2",
    ),
]  # fmt: skip


def test_what_an_engine_does_not_run_is_said_alone() -> None:
    for replica, rules, message in BROKEN:
        found = messages(replica, the_problem(**rules))
        with_handover = [one for one in found if "KV is handed over" not in one]
        assert with_handover == [message]


def test_an_engine_hands_kv_over_only_from_as_many_stages_as_it_says() -> None:
    problem = the_problem()
    assert problem.family.engine is not None
    most = problem.family.engine.stages_of(Role.DECODE, problem.model)
    decode = replace(PIPELINE, role=Role.DECODE)
    said = [f"has 2 stages and is to decode only: KV is handed over with {most} there"]
    assert messages(decode, problem) == (said if most < 2 else [])


def test_sglang_drafts_in_pipelines_only_where_it_prefills() -> None:
    problem = the_problem()
    assert problem.family.engine is not None
    model = replace(problem.model, draft=DraftShape(tokens=1, acceptance=0.5))
    for name, said in (("sglang", ["has 2 stages and drafts tokens, may have 1 then"]), ("vllm", [])):
        rules = replace(problem.family.engine, name=name)
        drafting = replace(problem, model=model, family=replace(problem.family, engine=rules))
        found = at("replica 0", check_engine(PIPELINE, drafting, Fleet.of(drafting.cluster)))
        assert [one.message for one in found] == [f"{message} ({name})" for message in said]
    sglang = replace(problem.family.engine, name="sglang")
    assert sglang.stages_of(Role.PREFILL, model) == sglang.stages_of(Role.UNIFIED, problem.model) == sglang.max_stages


def test_vllm_hands_over_windows_and_compressors_from_one_stage() -> None:
    problem = the_problem()
    assert problem.family.engine is not None
    engine, roles = problem.family.engine, (Role.PREFILL, Role.DECODE, Role.UNIFIED)
    assert [engine.stages_of(role, make_compressed()) for role in roles] == [1, 1, engine.max_stages]


def test_vllm_runs_layers_that_share_indexers_in_one_stage() -> None:
    problem = the_problem()
    assert problem.family.engine is not None
    mla = shape_of(kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, q_lora_rank=32)
    for layers, name, said in (
        (1, "vllm", ["has 2 stages and layers that share indexers, may have 1 then (vllm)"]),
        (1, "sglang", []),
        (None, "vllm", []),
    ):
        indexer = shape_of(top_tokens=32, heads=2, head_dim=64, key_bytes=68.0, layers=layers)
        draft = DraftShape(tokens=1, acceptance=0.5)  # for which SGLang has another reason
        model = replace(problem.model, kv_heads=1, mla=mla, indexer=indexer, draft=draft)
        rules = replace(problem.family.engine, name=name)
        sparse = replace(problem, model=model, family=replace(problem.family, engine=rules))
        found = at("replica 0", check_engine(PIPELINE, sparse, Fleet.of(sparse.cluster)))
        assert [one.message for one in found if "indexers" in one.message] == said


def test_an_engine_has_one_precision_and_workers_16_bit_kv() -> None:
    problem = the_problem()
    own = GpuPrecision(gpu="B", weights="B's", weight_bytes=1.0, kv_bytes=1.0)
    mixed = replace(problem, model=replace(problem.model, precisions=(own,)))
    replica = replace(PIPELINE, stages=(FIRST, replace(SECOND, gpu="B", devices=("b-0/0",))))
    assert messages(replica, mixed) == ["has stages in 2 precisions on A, B, must have one"]
    assert messages(replica, problem) == []
    assert messages(POOLED, mixed) == []
    narrow = replace(problem, model=replace(problem.model, precisions=(replace(own, gpu="A", weight_bytes=2.0),)))
    assert messages(POOLED, narrow) == ["has attention workers and KV of 1 bytes an element, which must be 2"]


def test_an_engine_has_gpus_of_one_vendor_and_workers_of_any() -> None:
    problem = the_problem()
    types = problem.cluster.gpu_types
    of_two = replace(problem.cluster, gpu_types=types | {"B": replace(types["B"], vendor="AMD")})
    mixed = replace(problem, cluster=of_two)
    replica = replace(PIPELINE, stages=(FIRST, replace(SECOND, gpu="B", devices=("b-0/0",))))
    assert messages(replica, mixed) == ["has stages on GPUs of NVIDIA and AMD, must have one vendor's"]
    assert messages(POOLED, mixed) == []


def test_devices_that_do_not_exist_lie_nowhere() -> None:
    nowhere = replace(PIPELINE, stages=(FIRST, replace(SECOND, devices=("x/0",))))
    assert messages(nowhere, the_problem(max_nodes=1)) == []
    assert messages(unclaimed(in_flight=0), the_problem()) == []
