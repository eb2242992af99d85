"""Replicas that an engine cannot run are refused with every reason."""

from __future__ import annotations

import re
from typing import Any

import pytest

from hetis.engines.errors import LayoutError
from hetis.engines.layout import layout_of
from hetis.engines.versions import Engine
from hetis.solver.model import DraftShape, ModelSpec
from hetis.solver.plan import Plan, Role, StagePlan
from tests.engines.plans import ALONE, MODEL, POOL, WITH_EXPERTS, plan_of, ranks_of, refused, stage_of, stages_of
from tests.models import replace, shape_of

BESIDE_WORKERS = plan_of(stage_of(), pools=(POOL,))


def in_fleet(plan: Plan, *nodes: object) -> Plan:
    return replace(plan, inputs={"documents": {"cluster": {"nodes": list(nodes)}}})


def with_sender(plan: Plan, sender: Plan) -> Plan:
    return replace(plan, replicas=(*plan.replicas, *sender.replicas))


def test_a_plan_that_counts_gpus_otherwise_than_its_fleet_is_refused() -> None:
    """Earlier versions counted from 0 whatever the indices of the fleet, and would now be started on other GPUs."""
    b = {"name": "b", "indices": [1, 2, 5], "gpus": [{"type": "T4", "count": 2}, {"type": "L4", "count": 1}]}
    known = "of the plan's fleet, where b has 1 (T4), 2 (T4), 5 (L4): plan again"
    assert refused(in_fleet(BESIDE_WORKERS, b)) == (f"b/0 is no T4 {known}",)
    moved = plan_of(stage_of(), pools=(replace(POOL, devices=("b/2", "b/5")),))
    with pytest.raises(LayoutError, match=re.escape(f"b/5 is no T4 {known}")):
        layout_of(in_fleet(moved, b), 0, MODEL)
    right = in_fleet(plan_of(stage_of(), pools=(replace(POOL, devices=("b/1", "b/2")),)), b)
    assert [process.gpus for process in layout_of(right, 0, MODEL).processes] == [(0,), (1,), (2,)]
    other = in_fleet(BESIDE_WORKERS, {**b, "count": 1})  # a group, whose node is b-0
    assert [process.gpus for process in layout_of(other, 0, MODEL).processes] == [(0,), (0,), (1,)]


@pytest.mark.parametrize("gpus", [None, {}, [None], [{"count": 2}], [{"type": "T4", "count": "2"}]])
def test_a_plan_with_a_broken_fleet_is_refused_by_the_gpus_it_lacks(gpus: object) -> None:
    """Launchers read a plan without the checks of its documents, which `hetis-plan check` makes."""
    plan = in_fleet(BESIDE_WORKERS, {"name": "b", "indices": [0, 1], "gpus": gpus})
    if isinstance(gpus, list):
        with pytest.raises(LayoutError, match="b/0 is no T4 of the plan's fleet"):
            layout_of(plan, 0, MODEL)
    else:
        assert [process.gpus for process in layout_of(plan, 0, MODEL).processes] == [(0,), (0,), (1,)]


@pytest.mark.parametrize("device", ["here", "a/x", "a/"])
def test_devices_without_an_index_are_refused_whatever_the_fleet_says(device: str) -> None:
    plan = plan_of(stage_of(devices=(device,), kv_head_groups_kept=8))
    known = in_fleet(plan, {"name": device.partition("/")[0], "indices": [1], "gpus": [{"type": "L4"}]})
    for given in (replace(plan, inputs={"documents": {}}), known):
        assert refused(given) == (f"stage 1: device {device!r} must be NODE/INDEX, such as gpu2/0",)


def test_everything_that_vllm_cannot_do_is_said_at_once() -> None:
    plan = plan_of(
        stage_of(num_layers=2, copies=2, devices=("a/0", "a/1"), kv_head_groups_kept=2),
        stage_of(first_layer=2, num_layers=1, tp=2, devices=("c/2", "d/0"), kv_head_groups_kept=4),
        stage_of(first_layer=3, num_layers=2, tp=3, devices=("e/0", "e/1", "here"), kv_head_groups_kept=2),
        pools=(replace(POOL, kv_head_groups=5),),
        role=Role.DECODE,
    )
    assert refused(plan) == (
        "the plan's stages have 5 layers, the model 4",
        "the replica is to decode only: the plugin occupies the vLLM connector that would carry prompts "
        "between replicas",
        "it decodes in 3 stages: vLLM's NIXL connector only supports decode replicas with one",
        "stage 1: it has 2 copies, vLLM has one of each stage",
        "stage 1: the plan places 7 KV heads, the model has 8",
        "stage 2: it has TP2 and stage 1 TP1, vLLM needs the same in every stage",
        "stage 2: it is on several nodes, must be on one: c/2, d/0",
        "stage 3: device 'here' must be NODE/INDEX, such as gpu2/0",
        "stage 3: it has TP3 and stage 1 TP1, vLLM needs the same in every stage",
        "stage 3: it is on several nodes, must be on one: e/0, e/1, here",
        "stage 3: 3 ranks do not divide 16 query heads and 8 KV heads",
        "stages have 2, 0, 0 attention workers: the plugin needs the same number in every stage, since a "
        "request's heads go to the same worker in all of them",
    )


LATENT = replace(MODEL, mla=shape_of(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8))
OF_ANOTHER_MODEL = {"name": "big", "num_layers": 4, "hidden": 128, "q_heads": 16, "kv_heads": 4, "head_dim": 8}


@pytest.mark.parametrize(
    ("plan", "model", "reasons"),
    [
        # The reader of files refuses it, too; plans from elsewhere only come here.
        (plan_of(stage_of(devices=(), kv_head_groups_kept=8)), MODEL, ["stage 1: it has no GPUs"]),
        # Such as Qwen2.5-0.5B, with 14 query heads and 2 KV heads.
        (
            plan_of(ranks_of(4, kv_head_groups_kept=1)),
            replace(MODEL, q_heads=14, kv_heads=2),
            ["stage 1: 4 ranks do not divide 14 query heads and 2 KV heads"],
        ),
        (
            replace(ALONE, inputs={"documents": {"model": OF_ANOTHER_MODEL}}),
            MODEL,
            ["the plan is of another model (big): kv_heads 4, not 8, vocab None, not 512"],
        ),
        (
            BESIDE_WORKERS,
            LATENT,
            [
                "it has attention workers, which tiny cannot have: attention is latent (MLA), and its KV cannot be "
                "split into head groups"
            ],
        ),
        (
            BESIDE_WORKERS,
            replace(MODEL, kv_bytes=1.0),
            ["the plan needs KV of 1 bytes per element, workers support 2 or 4: set --dtype"],
        ),
    ],
)
def test_what_no_engine_of_ours_runs_is_refused(plan: Plan, model: ModelSpec, reasons: list[str]) -> None:
    assert refused(plan, model) == tuple(reasons)


def test_what_is_almost_refused_runs() -> None:
    four = plan_of(ranks_of(4, kv_head_groups_kept=1))
    assert layout_of(four, 0, replace(MODEL, q_heads=12, kv_heads=2)).tensor_parallel == 4
    assert layout_of(BESIDE_WORKERS, 0, replace(MODEL, kv_bytes=1.0), dtype="bfloat16").workers
    assert refused(ALONE, replica=1) == ("there is no replica 1, the plan has 1, counted from 0",)


def test_vllm_gets_no_replica_whose_weights_it_does_not_load() -> None:
    model = replace(MODEL, weights="bnb-int4")
    for engine in (Engine.VLLM, Engine.VLLM_HETIS):
        [why] = refused(ALONE, model, engine=engine)
        assert "does not load bnb-int4 weights" in why
    assert layout_of(ALONE, 0, model, engine=Engine.SGLANG).servers


@pytest.mark.parametrize(("decodes_on", "is_refused"), [(1, True), (2, True), (4, False)])
def test_kv_that_several_ranks_hold_goes_to_as_many(decodes_on: int, *, is_refused: bool) -> None:
    few = replace(MODEL, kv_heads=2)
    sender = plan_of(ranks_of(4, kv_head_groups_kept=1), role=Role.PREFILL, micro_batch=0)
    receiver = ranks_of(decodes_on, "b", kv_head_groups_kept=max(1, 2 // decodes_on))
    plan = with_sender(plan_of(receiver, role=Role.DECODE, chunk_tokens=0), sender)
    if is_refused:
        [why] = refused(plan, few, engine=Engine.VLLM)
        assert why.startswith(f"it decodes in TP{decodes_on}, and prompts come from TP4, where ranks share 2 KV heads")
    else:
        layout_of(plan, 0, few, engine=Engine.VLLM)
    layout_of(plan, 0, few, engine=Engine.SGLANG)
    layout_of(plan, 1, few, engine=Engine.VLLM)
    other = replace(plan, replicas=(plan.replicas[0], replace(plan.replicas[1], role=Role.DECODE)))
    assert layout_of(other, 0, few, engine=Engine.VLLM).servers, "prompts do not come from decode replicas"


@pytest.mark.parametrize(("sends_from", "decodes_on", "is_refused"), [(1, 2, False), (2, 4, True), (4, 1, True)])
def test_states_go_to_ranks_with_blocks_of_as_many_tokens(
    sends_from: int, decodes_on: int, *, is_refused: bool
) -> None:
    few = replace(MODEL, kv_heads=2, linear=shape_of(layers=2, params=1, state_bytes=1000.0))

    def on(node: str, tp: int, role: Role) -> Plan:
        return plan_of(ranks_of(tp, node, kv_head_groups_kept=max(1, 2 // tp)), role=role, micro_batch=0)

    plan = with_sender(on("b", decodes_on, Role.DECODE), on("a", sends_from, Role.PREFILL))
    if is_refused:
        assert refused(plan, few, engine=Engine.VLLM) == (
            f"it decodes in TP{decodes_on}, and prompts come from TP{sends_from}, where ranks share 2 KV heads but "
            "divide states: vLLM's blocks then differ, which its NIXL connector does not support",
        )
    else:
        assert layout_of(plan, 0, few, engine=Engine.VLLM).has_states
    assert layout_of(plan, 0, few, engine=Engine.SGLANG).has_states
    assert layout_of(plan, 1, few, engine=Engine.VLLM).has_states


@pytest.mark.parametrize("ranks", [2, 4])
def test_kv_of_several_stages_is_not_written_to_more_ranks_than_heads(ranks: int) -> None:
    few = replace(MODEL, kv_heads=2)
    plan = plan_of(ranks_of(ranks, "b", kv_head_groups_kept=1), role=Role.DECODE, chunk_tokens=0)
    staged, read = (
        with_sender(plan, plan_of(*stages, role=Role.PREFILL, micro_batch=0, in_flight=2))
        for stages in (stages_of(2, 2), stages_of(4))
    )
    assert not layout_of(read, 0, few, engine=Engine.VLLM).pushes_kv
    if ranks > 2:
        assert refused(staged, few, engine=Engine.VLLM) == (
            "it decodes in TP4, where ranks share 2 KV heads, and prompts come from TP1, from several stages: vLLM's "
            "NIXL connector then needs the same number of ranks on both sides",
        )
    else:
        assert layout_of(staged, 0, few, engine=Engine.VLLM).pushes_kv
    assert not layout_of(staged, 0, few, engine=Engine.SGLANG).pushes_kv


FOUR = ranks_of(4, kv_head_groups_kept=4)
SHARING = {"stages": (replace(FOUR, tp=2, copies=2),), "in_flight": 2, "expert_parallel": True}


@pytest.mark.parametrize(
    ("changes", "model", "reasons"),
    [
        ({}, MODEL, ["its copies share experts, but tiny has none"]),
        (
            {"stages": (replace(FOUR, tp=2, copies=2, devices=("a/0", "a/1")),), "in_flight": 1},
            WITH_EXPERTS,
            [
                "its copies share experts: copies is 2, in_flight 1, must be equal and at least 2",
                "it has 2 GPUs for 2 copies of 2 ranks",
            ],
        ),
        (
            {"stages": (replace(ranks_of(3, kv_head_groups_kept=8), tp=1, copies=3),), "in_flight": 3},
            WITH_EXPERTS,
            ["its 3 ranks share 8 experts, a number that they must divide"],
        ),
        ({"stages": (), "in_flight": 1, "expert_parallel": False}, WITH_EXPERTS, ["it has no stages"]),
    ],
)
def test_copies_that_cannot_share_experts_are_refused(
    changes: dict[str, Any], model: ModelSpec, reasons: list[str]
) -> None:
    plan = plan_of(**(SHARING | changes))
    assert refused(plan, model, engine=Engine.VLLM) == tuple(reasons)


def test_copies_that_share_experts_have_no_attention_workers() -> None:
    [stage] = SHARING["stages"]
    shares = SHARING | {"stages": (replace(stage, kv_head_groups_kept=0),)}
    [why, *_] = refused(plan_of(pools=(replace(POOL, kv_head_groups=4),), **shares), WITH_EXPERTS)
    assert why == "its copies share experts: it must have one stage, without attention workers"


def test_only_our_plugin_has_attention_workers() -> None:
    for engine, program in ((Engine.VLLM, "vLLM"), (Engine.SGLANG, "SGLang")):
        unsupported = "SGLang does not support; " if engine is Engine.SGLANG else ""
        assert refused(BESIDE_WORKERS, engine=engine) == (
            f"it has attention workers, which {unsupported}vLLM only supports with hetis' plugin (engine vllm-hetis)",
        )
        layout = layout_of(ALONE, 0, MODEL, engine=engine)
        assert [(p.name, p.kind.value) for p in layout.processes] == [(program.lower(), "server")]


SPLIT = stages_of(3, 1, kv_head_groups_kept=8)
WHOLE = ALONE.replicas[0].stages


def test_prefill_and_decode_apart_take_what_the_connectors_take() -> None:
    for engine in Engine:
        prefill = layout_of(plan_of(*SPLIT, role=Role.PREFILL, micro_batch=0, in_flight=3), 0, MODEL, engine=engine)
        assert (prefill.role, prefill.seats, prefill.chunk_tokens, prefill.micro_batch) == (Role.PREFILL, 3, 32, 0)
        decode = layout_of(plan_of(*WHOLE, role=Role.DECODE, chunk_tokens=0), 0, MODEL, engine=engine)
        assert (decode.role, decode.seats, decode.chunk_tokens) == (Role.DECODE, 4, 0)
    staged_decode = plan_of(*SPLIT, role=Role.DECODE, chunk_tokens=0)
    assert refused(staged_decode, engine=Engine.VLLM) == (
        "it decodes in 2 stages: vLLM's NIXL connector only supports decode replicas with one",
    )
    assert layout_of(staged_decode, 0, MODEL, engine=Engine.SGLANG).layers == (3, 1)


@pytest.mark.parametrize(
    ("stages", "sends", "is_refused"),
    [(WHOLE, Role.PREFILL, True), (SPLIT, Role.PREFILL, False), (WHOLE, Role.DECODE, False)],
)
def test_sglang_decodes_in_the_stages_of_its_prefill_replicas(
    stages: tuple[StagePlan, ...], sends: Role, *, is_refused: bool
) -> None:
    decodes = plan_of(*SPLIT, role=Role.DECODE, chunk_tokens=0)
    plan = with_sender(decodes, plan_of(*stages, role=sends, micro_batch=0, in_flight=3))
    if is_refused:
        assert refused(plan, engine=Engine.SGLANG) == (
            "it decodes in 2 stages: SGLang needs the same number in prefill replicas, not 1",
        )
    else:
        assert layout_of(plan, 0, MODEL, engine=Engine.SGLANG).servers


DRAFTING = replace(MODEL, draft=DraftShape(tokens=1, acceptance=0.5))


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (replace(MODEL, sliding_window=64), "sliding-window layers"),
        (DRAFTING, "a layer that drafts"),
        (replace(MODEL, linear=shape_of(layers=2, params=1, state_bytes=1000.0)), "layers that keep states"),
    ],
)
def test_vllm_prefills_in_several_stages_only_where_layers_keep_all_kv(model: ModelSpec, what: str) -> None:
    assert refused(plan_of(*SPLIT, role=Role.PREFILL), model, engine=Engine.VLLM) == (
        f"it prefills in several stages: vLLM's NIXL connector does not support this with {what}",
    )


def test_stages_of_a_replica_have_gpus_of_one_vendor() -> None:
    first, second = SPLIT
    plan = plan_of(first, replace(second, gpu="MI300X-192GB"), in_flight=2)
    for engine in (Engine.VLLM, Engine.SGLANG):
        assert "an engine needs GPUs of a single vendor" in "; ".join(refused(plan, engine=engine))


def test_sglang_does_not_draft_in_a_pipeline() -> None:
    plan = plan_of(*SPLIT, in_flight=2)
    assert layout_of(plan, 0, DRAFTING, engine=Engine.VLLM).draft_tokens == 1
    with pytest.raises(LayoutError, match="it drafts tokens in 2 stages: SGLang only supports that in one"):
        layout_of(plan, 0, DRAFTING, engine=Engine.SGLANG)
