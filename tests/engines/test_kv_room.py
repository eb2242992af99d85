"""The KV room of a replica's processes, its seats and the longest request."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.engines.kv_room import PAGE_TOKENS, PROMPT_TOKENS
from hetis.engines.layout import Layout, layout_of
from hetis.engines.versions import Engine
from hetis.solver.model import DraftShape
from hetis.solver.plan import Role
from tests.engines.plans import (
    ALONE,
    LAYER_BYTES,
    MODEL,
    PAGES,
    POOL,
    WITH_EXPERTS,
    plan_of,
    ranks_of,
    refused,
    stage_of,
    stages_of,
)
from tests.models import replace, shape_of
from tests.solver.instances import make_compressed


def test_a_smaller_machine_needs_less_and_float32_twice_as_much() -> None:
    plan = plan_of(stage_of(), pools=(POOL,))
    found = layout_of(plan, 0, MODEL, dtype="float32", kv_tokens=100)
    pages = -(-100 // PAGE_TOKENS)
    assert [p.kv_bytes for p in found.processes] == [
        heads * 4 * LAYER_BYTES // PAGES * pages * 2 for heads in (2, 3, 3)
    ]


def test_copies_that_share_experts_leave_kv_room_to_what_plans_do_not_count() -> None:
    four = stage_of(tp=2, copies=2, devices=("a/0", "a/1", "a/2", "a/3"), kv_head_groups_kept=4)
    plan = plan_of(four, in_flight=2, expert_parallel=True, kv_tokens=200_000)
    layout = layout_of(plan, 0, WITH_EXPERTS, engine=Engine.VLLM)
    shared = 4 * (3 * 128 * 64) * 2 // 2  # half of each layer's shared expert, which a rank holds whole
    workspace = 2 * (4 + 32) * 2 * (128 + 64) * 2  # for the tokens of both copies with two experts each
    of_tokens = -(-layout.kv_tokens // 16) * 4 * LAYER_BYTES // PAGES * 4
    assert layout.rank_kv_bytes == of_tokens - shared - workspace
    assert layout.context_tokens is None, "the model's full context fits"
    four_shared = shape_of(num_experts=8, active_experts=2, expert_intermediate=64, shared_experts=4, every=2)
    other = replace(MODEL, moe=four_shared, draft=DraftShape(tokens=2, acceptance=0.5))
    wider = workspace + 2 * 4 * 2 * 2 * (128 + 64) * 2  # each request decodes two tokens more
    drafting = layout_of(plan, 0, other, engine=Engine.VLLM).rank_kv_bytes
    assert drafting == of_tokens * 5 // 4 - 2 * shared - wider, "four shared experts in every other layer"
    linear = replace(WITH_EXPERTS, linear=shape_of(layers=2, params=1, state_bytes=1000.0))
    requests = 4 + 1  # of a copy, one is being prefilled
    states = 2 * requests * 1000 // 2  # on each of two ranks
    assert layout_of(plan, 0, linear, engine=Engine.VLLM).rank_kv_bytes == of_tokens // 2 + states - shared - workspace
    # All 4,096 tokens of the context fit into the pages of the plan, but not beside what it does not count.
    layout = layout_of(plan_of(four, in_flight=2, expert_parallel=True, kv_tokens=4112), 0, WITH_EXPERTS)
    left = layout.rank_kv_bytes // (4 * LAYER_BYTES // PAGES * 4)
    assert layout.context_tokens == longest(left) < 4096
    small = plan_of(four, in_flight=2, expert_parallel=True, kv_tokens=320)
    assert refused(small, WITH_EXPERTS, engine=Engine.VLLM) == (
        f"its copies share experts: vLLM needs {shared + workspace} bytes of a rank's planned KV for shared experts "
        "and the workspace of all, which leaves no room for a request",
    )


@given(
    kv_tokens=st.integers(1000, 6000),
    tp=st.sampled_from((1, 2, 4)),
    copies=st.integers(1, 2),
    stages=st.integers(1, 2),
    drafts=st.booleans(),
)
def test_the_longest_request_fits_into_the_kv_of_every_rank(
    kv_tokens: int, tp: int, copies: int, stages: int, drafts: bool
) -> None:
    """Otherwise vLLM does not start (`_check_enough_kv_cache_memory`)."""
    stages, shares = (1, {"in_flight": 2, "expert_parallel": True}) if copies > 1 else (stages, {"in_flight": stages})
    shapes = [
        stage_of(
            tp=tp,
            copies=copies,
            first_layer=number * 4 // stages,
            num_layers=4 // stages,
            devices=tuple(f"n{number}/{i}" for i in range(tp * copies)),
            kv_head_groups_kept=8 // tp,
        )
        for number in range(stages)
    ]
    model = replace(WITH_EXPERTS, draft=DraftShape(tokens=1, acceptance=0.5) if drafts else None)
    plan = plan_of(*shapes, micro_batch=2, chunk_tokens=16, kv_tokens=kv_tokens * copies, **shares)
    layout = layout_of(plan, 0, model, engine=Engine.VLLM)
    longest = layout.context_tokens or model.max_position
    for server, stage in zip(layout.servers, shapes, strict=True):
        layers = stage.num_layers + (drafts and stage is shapes[-1])
        assert longest * layers * stage.kv_head_groups_kept * 2 * 8 * 2 <= server.kv_bytes


def test_a_context_that_is_longer_than_the_kv_room_is_cut() -> None:
    fixed, room = functools.partial(layout_of, kv_tokens=PAGES * PAGE_TOKENS), (PAGES - 1) * PAGE_TOKENS
    assert fixed(ALONE, 0, replace(MODEL, max_position=room + 1)).context_tokens == room  # engines reserve one page
    assert fixed(ALONE, 0, replace(MODEL, max_position=room)).context_tokens is None
    assert layout_of(ALONE, 0, replace(MODEL, max_position=room)).context_tokens == longest(PAGES), "it may find less"
    assert layout_of(ALONE, 0, replace(MODEL, max_position=longest(PAGES))).context_tokens is None


def longest(pages: int) -> int:
    """Return the longest context of an engine that finds its own KV: a tenth less than planned."""
    return int(0.9 * (pages - 1) * PAGE_TOKENS) // PAGE_TOKENS * PAGE_TOKENS


def test_a_context_fits_in_every_stage_whichever_layers_have_an_indexer() -> None:
    """vLLM does not start unless the longest request fits in each stage, and plans count the mean of all layers."""
    indexer = shape_of(top_tokens=8, heads=1, head_dim=8, key_bytes=64.0, layers=1)
    model = replace(
        MODEL,
        max_position=10**6,
        mla=shape_of(kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=8),
        indexer=indexer,
    )
    drafting = replace(model, draft=DraftShape(tokens=1, acceptance=0.5))
    alone = plan_of(stage_of(kv_head_groups_kept=1))
    halves = plan_of(*stages_of(2, 2, kv_head_groups_kept=1), in_flight=2)
    uneven = plan_of(*stages_of(1, 3, kv_head_groups_kept=1), in_flight=2)
    for plan, of, engine, mean, most in (
        (alone, model, Engine.VLLM, 64 + 64 / 4, 64 + 64 / 4),
        (alone, drafting, Engine.VLLM, 64 + 64 / 4, 64 + 64 * 2 / 5),
        (halves, model, Engine.SGLANG, 64 + 64 / 4, 64 + 64 / 2),
        (uneven, model, Engine.SGLANG, 64 + 64 / 4, 64 + 64),
        (uneven, replace(model, indexer=indexer | {"layers": 2}), Engine.SGLANG, 64 + 64 / 2, 64 + 64),
    ):
        layout = layout_of(plan, 0, of, engine=engine)
        pages = int(PAGES * mean / most)
        assert layout.context_tokens == ((pages - 1) * PAGE_TOKENS if layout.fixes_kv else longest(pages))
        assert layout.fixes_kv == (engine is Engine.SGLANG)
    assert refused(halves, model, engine=Engine.VLLM) == (
        "it has 2 stages, and layers share indexers: vLLM's stages do not pass on which tokens an indexer chose",
    )
    everywhere = layout_of(halves, 0, replace(model, indexer=indexer | {"layers": None}), engine=Engine.VLLM)
    assert everywhere.context_tokens == longest(PAGES), "all layers have an indexer, as the plan counts"


def test_states_and_the_kv_of_a_drafting_layer_have_room() -> None:
    """vLLM 0.32 keeps ``1 + num_speculative_blocks`` states for a request (`MambaSpec.max_memory_usage_bytes`)."""
    linear = replace(MODEL, linear=shape_of(layers=2, params=1, state_bytes=1000.0))
    plain, with_states = layout_of(ALONE, 0, MODEL).rank_kv_bytes, layout_of(ALONE, 0, linear).rank_kv_bytes
    assert plain is not None
    requests = 4 + 1  # one is being prefilled
    assert with_states == plain / 2 + 2 * requests * 1000
    drafting = layout_of(ALONE, 0, replace(linear, draft=DraftShape(tokens=2, acceptance=0.5)))
    assert drafting.rank_kv_bytes == 5 / 4 * (plain / 2 + 2 * requests * 3 * 1000), "a layer more, of the mean"


def test_a_prefill_replica_runs_as_many_prompts_as_fill_its_chunks() -> None:
    """An iteration of vLLM or SGLang has at most a prompt for each seat."""
    prefill = plan_of(*ALONE.replicas[0].stages, role=Role.PREFILL, micro_batch=0, in_flight=2, chunk_tokens=2048)
    for engine in Engine:
        assert layout_of(prefill, 0, MODEL, engine=engine).seats == 2 * 2048 / PROMPT_TOKENS
    kept = replace(prefill, inputs={"engine_settings": {"max_num_seqs": 5}})
    assert layout_of(kept, 0, MODEL).seats == 5
    plenty = replace(prefill, inputs={"engine_settings": {"max_num_seqs": 500}})
    small = replace(MODEL, linear=shape_of(layers=2, params=1, state_bytes=100.0))
    assert layout_of(plenty, 0, MODEL).seats == layout_of(prefill, 0, small).seats == 64
    [one] = prefill.replicas
    pair = stage_of(copies=2, devices=("a/0", "a/1"), kv_head_groups_kept=8)
    copies = replace(prefill, replicas=(replace(one, stages=(pair,), expert_parallel=True, kv_tokens=100_000),))
    assert layout_of(copies, 0, WITH_EXPERTS, engine=Engine.VLLM).seats == 2048 / PROMPT_TOKENS
    states = replace(MODEL, linear=shape_of(layers=2, params=1, state_bytes=100_000.0))
    found = layout_of(prefill, 0, states)
    assert found.seats == found.rank_kv_bytes // 200_000 < 64, "vLLM does not start without a state for each"


def test_windows_and_inputs_of_compressors_are_whole_on_every_rank() -> None:
    model = make_compressed(q_heads=16)
    ranks = plan_of(ranks_of(4, kv_head_groups_kept=1, num_layers=6))
    found = layout_of(ranks, 0, model).rank_kv_bytes
    assert found is not None
    kv = 6 * PAGES * math.ceil(PAGE_TOKENS * model.kv_bytes_per_token_group() / 2) * 2
    states = 5 * model.state_bytes() + 32 * model.chunk_state_bytes()  # one is being prefilled
    assert found == pytest.approx(kv + 6 * states, abs=1)
    drafting = layout_of(ranks, 0, replace(model, draft=DraftShape(tokens=2, acceptance=0.5))).rank_kv_bytes
    assert drafting == pytest.approx(7 / 6 * found, abs=1), "a layer more, but no state for each draft"
    eight = plan_of(ranks_of(8, kv_head_groups_kept=1, num_layers=6))
    assert refused(eight, model) == ("stage 1: 8 ranks do not divide the 4 groups of heads in its output projection",)
    halves = stages_of(3, 3, kv_head_groups_kept=1)
    assert layout_of(plan_of(*halves, in_flight=2), 0, model, engine=Engine.VLLM).layers == (3, 3)
    assert refused(plan_of(*halves, role=Role.PREFILL), model, engine=Engine.VLLM) == (
        "it prefills in several stages: vLLM's NIXL connector does not support this with layers that keep states",
    )


def test_kv_of_a_byte_takes_half_and_latent_kv_is_one_group_on_every_rank() -> None:
    full, half = (layout_of(ALONE, 0, replace(MODEL, kv_bytes=kv)) for kv in (2.0, 1.0))
    assert (full.kv_is_fp8, half.kv_is_fp8) == (False, True)
    assert full.rank_kv_bytes == 2 * half.rank_kv_bytes
    nvfp4 = replace(MODEL, kv_bytes=0.5625)
    assert refused(ALONE, nvfp4) == ("the plan needs KV of 0.5625 bytes per element, vLLM supports 1 or 2",)
    assert layout_of(ALONE, 0, nvfp4, dtype="float16").rank_kv_bytes == full.rank_kv_bytes
    mla = shape_of(kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    model = replace(MODEL, mla=mla)
    latent = layout_of(plan_of(stage_of(kv_head_groups_kept=1)), 0, model)
    assert latent.rank_kv_bytes == 4 * PAGES * PAGE_TOKENS * (24 + 8) * 2


def test_an_engine_beside_others_takes_no_more_than_is_free() -> None:
    """22.03 GiB of an L4 are reported; contexts take 0.5 of what others leave."""

    def layout(reserved: str, engine: Engine = Engine.VLLM, share: float | None = None) -> Layout:
        cluster = cluster_document(reserved)
        inputs = {"documents": {"cluster": cluster}, "engine_settings": {"gpu_memory_utilization": share}}
        return layout_of(
            replace(plan_of(stage_of(gpu="L4", kv_head_groups_kept=8)), inputs=inputs), 0, MODEL, engine=engine
        )

    assert layout("0B").utilisation == layout("256MiB").utilisation == 0.92
    assert layout("2GiB").utilisation == 0.88, "(22.03 - 0.5 - 2) / 22.03"
    assert layout("10%").utilisation == 0.86
    assert layout("2GiB", share=0.5).utilisation == 0.5
    assert layout("2GiB", Engine.SGLANG).utilisation is None, "its share is of what it finds free"
    assert not layout("2GiB").fixes_kv


def test_stages_beside_others_that_hold_more_have_the_kv_that_is_planned() -> None:
    cluster = cluster_document("2GiB")
    cluster["nodes"].append({"name": "b", "gpus": [{"type": "L4", "reserved": "4GiB"}]})
    stages = (
        stage_of(gpu="L4", kv_head_groups_kept=8, num_layers=2),
        stage_of(gpu="L4", kv_head_groups_kept=8, first_layer=2, num_layers=2, devices=("b/0",)),
    )
    plan = replace(plan_of(*stages, in_flight=2), inputs={"documents": {"cluster": cluster}})
    found = layout_of(plan, 0, MODEL, engine=Engine.VLLM)
    assert (found.fixes_kv, found.utilisation) == (True, 0.79)
    cluster["nodes"][1]["gpus"][0]["reserved"] = "2GiB"
    found = layout_of(plan, 0, MODEL, engine=Engine.VLLM)
    assert (found.fixes_kv, found.utilisation) == (False, 0.88)


def cluster_document(reserved: str) -> dict[str, Any]:
    return {
        "apiVersion": "hetis/v1",
        "kind": "Cluster",
        "name": "desk",
        "nodes": [{"name": "a", "gpus": [{"type": "L4", "reserved": reserved}]}],
        "network": {"bandwidth": "10Gbps", "latency": "20us"},
    }
