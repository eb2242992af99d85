"""One list states what runs where; replicas that vLLM cannot run are refused with every reason."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.engines.errors import LayoutError
from hetis.engines.kv_room import PAGE_TOKENS, PROMPT_TOKENS
from hetis.engines.layout import Layout, layout_of
from hetis.engines.planned import KvPartner, kv_partners, unknown_nodes
from hetis.engines.versions import Engine
from hetis.solver.model import DraftShape, ModelSpec
from hetis.solver.plan import AttentionWorkerPool, KvRoute, Plan, Role
from tests.engines.plans import LAYER_BYTES, MODEL, PAGES, POOL, WITH_EXPERTS, plan_of, sharing, stage_of, staged
from tests.models import replace, shape_of
from tests.solver.instances import make_compressed


def rows(layout: Layout) -> list[tuple[str, str, int, str, tuple[int, ...], int]]:
    return [(p.name, p.kind.value, p.stage, p.node, p.gpus, p.kv_bytes) for p in layout.processes]


def test_a_primary_is_one_vllm_and_each_card_a_worker_with_the_kv_that_the_plan_counts_on() -> None:
    layout = layout_of(plan_of(stage_of(), pools=(POOL,)), 0, MODEL)
    assert rows(layout) == [
        ("vllm", "server", 0, "a", (0,), 2 * 4 * LAYER_BYTES),
        ("b/0", "attention-worker", 0, "b", (0,), 3 * 4 * LAYER_BYTES),
        ("b/1", "attention-worker", 0, "b", (1,), 3 * 4 * LAYER_BYTES),
    ]
    assert [(one.name, one.processes) for one in layout.workers] == [("b/0", ("b/0",)), ("b/1", ("b/1",))]
    assert (layout.tensor_parallel, layout.layers, layout.seats, layout.chunk_tokens) == (1, (4,), 4, 32)


def test_a_plan_that_counts_gpus_otherwise_than_its_fleet_is_refused() -> None:
    """Earlier versions counted from 0 whatever the indices of the fleet, and would now be started on other GPUs."""
    b = {"name": "b", "indices": [1, 2, 5], "gpus": [{"type": "T4", "count": 2}, {"type": "L4", "count": 1}]}
    own = {"inputs": {"documents": {"cluster": {"nodes": [b]}}}}
    known = "of the plan's fleet, where b has 1 (T4), 2 (T4), 5 (L4): plan again"
    with pytest.raises(LayoutError) as refused:
        layout_of(replace(plan_of(stage_of(), pools=(POOL,)), **own), 0, MODEL)
    assert str(refused.value) == f"b/0 is no T4 {known}"
    moved = replace(POOL, devices=("b/2", "b/5"))
    with pytest.raises(LayoutError, match=re.escape(f"b/5 is no T4 {known}")):
        layout_of(replace(plan_of(stage_of(), pools=(moved,)), **own), 0, MODEL)
    right = replace(plan_of(stage_of(), pools=(replace(POOL, devices=("b/1", "b/2")),)), **own)
    assert [process.gpus for process in layout_of(right, 0, MODEL).processes] == [(0,), (1,), (2,)]
    group = {**b, "count": 1}  # whose node is b-0
    other = replace(plan_of(stage_of(), pools=(POOL,)), inputs={"documents": {"cluster": {"nodes": [group]}}})
    assert [process.gpus for process in layout_of(other, 0, MODEL).processes] == [(0,), (0,), (1,)]


@pytest.mark.parametrize("gpus", [None, {}, [None], [{"count": 2}], [{"type": "T4", "count": "2"}]])
def test_a_plan_with_a_broken_fleet_is_refused_by_the_gpus_it_lacks(gpus: object) -> None:
    """Launchers read a plan without the checks of its documents, which `hetis-plan check` makes."""
    nodes = [{"name": "b", "indices": [0, 1], "gpus": gpus}]
    plan = replace(plan_of(stage_of(), pools=(POOL,)), inputs={"documents": {"cluster": {"nodes": nodes}}})
    if isinstance(gpus, list):
        with pytest.raises(LayoutError, match="b/0 is no T4 of the plan's fleet"):
            layout_of(plan, 0, MODEL)
    else:
        assert [process.gpus for process in layout_of(plan, 0, MODEL).processes] == [(0,), (0,), (1,)]


def test_a_smaller_machine_needs_less_and_float32_twice_as_much() -> None:
    plan = plan_of(stage_of(), pools=(POOL,))
    found = layout_of(plan, 0, MODEL, dtype="float32", kv_tokens=100)
    pages = -(-100 // PAGE_TOKENS)
    assert [p.kv_bytes for p in found.processes] == [
        heads * 4 * LAYER_BYTES // PAGES * pages * 2 for heads in (2, 3, 3)
    ]


def test_stages_on_several_nodes_are_processes_of_vllm_and_each_rank_has_a_worker_process_of_its_own() -> None:
    layout = layout_of(staged(), 0, MODEL)
    assert rows(layout) == [
        ("vllm", "server", 0, "a", (0, 1), 1 * 3 * LAYER_BYTES),
        ("vllm-1", "server-stage", 1, "c", (2, 3), 2 * 1 * LAYER_BYTES),
        ("b/0.rank0", "attention-worker", 0, "b", (0,), 3 * 3 * LAYER_BYTES),
        ("b/0.rank1", "attention-worker", 0, "b", (0,), 3 * 3 * LAYER_BYTES),
        ("c/4.rank2", "attention-worker", 1, "c", (4,), 2 * 1 * LAYER_BYTES),
        ("c/4.rank3", "attention-worker", 1, "c", (4,), 2 * 1 * LAYER_BYTES),
    ]
    [worker] = layout.workers
    assert worker.name == "b/0+c/4"
    assert worker.processes == ("b/0.rank0", "b/0.rank1", "c/4.rank2", "c/4.rank3"), "in the order of vLLM's ranks"
    assert [p.sharing for p in layout.attention_workers] == [2, 2, 2, 2]
    assert [layout.caller(p).name for p in layout.attention_workers] == ["vllm", "vllm", "vllm-1", "vllm-1"]


def test_stages_on_one_node_are_one_vllm_with_room_for_the_largest() -> None:
    first, second = staged().replicas[0].stages
    plan = plan_of(
        first, replace(second, devices=("a/2", "a/3")), pools=staged().replicas[0].attention_workers, in_flight=2
    )
    layout = layout_of(plan, 0, MODEL)
    assert rows(layout)[0] == ("vllm", "server", 0, "a", (0, 1, 2, 3), 3 * LAYER_BYTES)
    assert len(layout.servers) == 1
    assert layout.layers == (3, 1)
    assert layout.seats == 8
    assert {layout.caller(p).name for p in layout.attention_workers} == {"vllm"}
    more = replace(plan, replicas=(replace(plan.replicas[0], max_num_seqs=12),))
    assert (layout_of(more, 0, MODEL).seats, layout_of(more, 0, MODEL).micro_batch) == (12, 6)


def test_a_card_that_stages_share_has_a_process_for_each_with_memory_of_its_own() -> None:
    layout = layout_of(sharing(), 0, MODEL)
    assert [(p.name, p.stage, p.gpus, p.kv_bytes, p.sharing) for p in layout.attention_workers] == [
        ("b/0.rank0", 0, (0,), 3 * 3 * LAYER_BYTES, 2),
        ("b/0.rank1", 1, (0,), 3 * 1 * LAYER_BYTES, 2),
        ("b/1.rank0", 0, (1,), 3 * 3 * LAYER_BYTES, 2),
        ("b/1.rank1", 1, (1,), 3 * 1 * LAYER_BYTES, 2),
    ]
    assert [one.name for one in layout.workers] == ["b/0", "b/1"]


def test_a_replica_without_attention_workers_is_vllm_alone() -> None:
    layout = layout_of(plan_of(stage_of(kv_head_groups_kept=8)), 0, MODEL)
    assert (len(layout.processes), layout.workers) == (1, ())


def test_a_name_that_would_be_too_long_is_a_number() -> None:
    plan = sharing()
    long = [replace(pool, devices=(f"{'n' * 70}/0", "b/1")) for pool in plan.replicas[0].attention_workers]
    layout = layout_of(plan_of(*plan.replicas[0].stages, pools=tuple(long)), 0, MODEL)
    assert [one.name for one in layout.workers] == ["worker-0", "b/1"]


def refused(
    plan: Plan, model: ModelSpec = MODEL, *, replica: int = 0, engine: Engine = Engine.VLLM_HETIS
) -> tuple[str, ...]:
    with pytest.raises(LayoutError) as caught:
        layout_of(plan, replica, model, engine=engine)
    return caught.value.messages


@pytest.mark.parametrize("device", ["here", "a/x", "a/"])
def test_devices_without_an_index_are_refused_whatever_the_fleet_says(device: str) -> None:
    a = {"name": device.partition("/")[0], "indices": [1], "gpus": [{"type": "L4"}]}
    plan = plan_of(stage_of(devices=(device,), kv_head_groups_kept=8))
    for documents in ({}, {"cluster": {"nodes": [a]}}):
        given = replace(plan, inputs={"documents": documents})
        assert refused(given) == (f"stage 1: device {device!r} must be NODE/INDEX, such as gpu2/0",)


def test_a_stage_without_gpus_is_refused() -> None:
    """The reader of files refuses it, too; plans from elsewhere only come here."""
    assert refused(plan_of(stage_of(devices=(), kv_head_groups_kept=8))) == ("stage 1: it has no GPUs",)


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


@pytest.mark.parametrize(("decodes_on", "is_refused"), [(1, True), (2, True), (4, False)])
def test_kv_that_several_ranks_hold_goes_to_as_many(decodes_on: int, *, is_refused: bool) -> None:
    few = replace(MODEL, kv_heads=2)
    sender = plan_of(
        stage_of(tp=4, devices=tuple(f"a/{i}" for i in range(4)), kv_head_groups_kept=1),
        role=Role.PREFILL, micro_batch=0,
    ).replicas[0]  # fmt: skip
    devices = tuple(f"b/{i}" for i in range(decodes_on))
    kept = max(1, 2 // decodes_on)
    receiver = stage_of(tp=decodes_on, devices=devices, kv_head_groups_kept=kept)
    plan = plan_of(receiver, role=Role.DECODE, chunk_tokens=0)
    plan = replace(plan, replicas=(plan.replicas[0], sender))
    says = f"it decodes in TP{decodes_on}, and prompts come from TP4, where ranks share 2 KV heads"
    if is_refused:
        assert refused(plan, few, engine=Engine.VLLM)[0].startswith(says)
    else:
        layout_of(plan, 0, few, engine=Engine.VLLM)
    layout_of(plan, 0, few, engine=Engine.SGLANG)
    layout_of(plan, 1, few, engine=Engine.VLLM)
    other = replace(plan, replicas=(plan.replicas[0], replace(sender, role=Role.DECODE)))
    assert layout_of(other, 0, few, engine=Engine.VLLM).servers, "prompts do not come from decode replicas"


@pytest.mark.parametrize(("sends_from", "decodes_on", "is_refused"), [(1, 2, False), (2, 4, True), (4, 1, True)])
def test_states_go_to_ranks_with_blocks_of_as_many_tokens(
    sends_from: int, decodes_on: int, *, is_refused: bool
) -> None:
    few = replace(MODEL, kv_heads=2, linear=shape_of(layers=2, params=1, state_bytes=1000.0))

    def on(node: str, tp: int, role: Role) -> Plan:
        devices = tuple(f"{node}/{i}" for i in range(tp))
        return plan_of(stage_of(tp=tp, devices=devices, kv_head_groups_kept=max(1, 2 // tp)), role=role, micro_batch=0)

    decode, prefill = on("b", decodes_on, Role.DECODE), on("a", sends_from, Role.PREFILL)
    plan = replace(decode, replicas=(*decode.replicas, *prefill.replicas))
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
    halves = tuple(
        stage_of(first_layer=2 * i, num_layers=2, kv_head_groups_kept=2, devices=(f"a/{i}",)) for i in range(2)
    )
    sender = plan_of(*halves, role=Role.PREFILL, micro_batch=0, in_flight=2).replicas[0]
    whole = stage_of(kv_head_groups_kept=2, devices=("a/0",))
    receiver = stage_of(tp=ranks, devices=tuple(f"b/{i}" for i in range(ranks)), kv_head_groups_kept=1)
    plan = plan_of(receiver, role=Role.DECODE, chunk_tokens=0)
    staged, read = (
        replace(plan, replicas=(plan.replicas[0], one)) for one in (sender, replace(sender, stages=(whole,)))
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


def test_replicas_exchange_kv_with_all_that_routes_join_over_others() -> None:
    """Routes 0 -> 1 <- 2 -> 3 and 4 -> 5, a replica without a route, and one with both roles."""
    gpus = ("T4", "L4", "T4", "A100", "L4", "L4", "H100", "V100")
    roles = (Role.PREFILL, Role.DECODE) * 3 + (Role.DECODE, Role.UNIFIED)
    replicas = tuple(
        plan_of(stage_of(gpu=gpu, devices=(f"n{i}/0",), kv_head_groups_kept=8), role=role).replicas[0]
        for i, (gpu, role) in enumerate(zip(gpus, roles, strict=True))
    )
    routes = tuple(KvRoute(prefill=one, decode=other, rate=1.0) for one, other in ((0, 1), (2, 1), (2, 3), (4, 5)))
    plan = replace(plan_of(stage_of()), replicas=replicas, kv_routes=routes)

    def kinds(*numbers: int) -> tuple[KvPartner, ...]:
        return tuple(dict.fromkeys(KvPartner(roles[i], (gpus[i],), 1) for i in numbers))

    assert len(kinds(0, 1, 2, 3)) == 3, "two are alike"
    assert kv_partners(plan) == [*[kinds(0, 1, 2, 3)] * 4, *[kinds(4, 5)] * 2, (), ()]
    assert kv_partners(replace(plan, kv_routes=())) == [*[kinds(*range(7))] * 7, ()]
    alone = replace(plan, replicas=(replicas[0], replicas[7]), kv_routes=())
    assert kv_partners(alone) == [(), ()]


def test_a_replica_that_is_not_there_is_told() -> None:
    plan = plan_of(stage_of(kv_head_groups_kept=8))
    assert refused(plan, replica=1) == ("there is no replica 1, the plan has 1, counted from 0",)


def test_vllm_gets_no_replica_whose_weights_it_does_not_load() -> None:
    plan, model = plan_of(stage_of(kv_head_groups_kept=8)), replace(MODEL, weights="bnb-int4")
    for engine in (Engine.VLLM, Engine.VLLM_HETIS):
        [why] = refused(plan, model, engine=engine)
        assert "does not load bnb-int4 weights" in why
    assert layout_of(plan, 0, model, engine=Engine.SGLANG).servers


def test_copies_that_cannot_share_experts_are_refused() -> None:
    four = stage_of(tp=2, copies=2, devices=("a/0", "a/1", "a/2", "a/3"), kv_head_groups_kept=4)

    def why(plan: Plan, model: ModelSpec = WITH_EXPERTS) -> tuple[str, ...]:
        return refused(plan, model, engine=Engine.VLLM)

    assert why(plan_of(four, in_flight=2, expert_parallel=True), MODEL) == (
        "its copies share experts, but tiny has none",
    )
    assert why(plan_of(replace(four, devices=("a/0", "a/1")), in_flight=1, expert_parallel=True)) == (
        "its copies share experts: copies is 2, in_flight 1, must be equal and at least 2",
        "it has 2 GPUs for 2 copies of 2 ranks",
    )
    six = stage_of(tp=1, copies=3, devices=("a/0", "a/1", "a/2"), kv_head_groups_kept=8)
    assert why(plan_of(six, in_flight=3, expert_parallel=True)) == (
        "its 3 ranks share 8 experts, a number that they must divide",
    )
    pool = replace(POOL, kv_head_groups=4)
    with_workers = plan_of(replace(four, kv_head_groups_kept=0), pools=(pool,), in_flight=2, expert_parallel=True)
    assert refused(with_workers, WITH_EXPERTS)[0] == (
        "its copies share experts: it must have one stage, without attention workers"
    )
    assert why(replace(plan_of(four), replicas=(replace(plan_of(four).replicas[0], stages=()),))) == (
        "it has no stages",
    )


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


def test_query_heads_are_divided_even_if_ranks_share_kv_heads() -> None:
    """Such as Qwen2.5-0.5B, with 14 query heads and 2 KV heads, on 4 GPUs."""
    four = plan_of(stage_of(tp=4, devices=tuple(f"a/{i}" for i in range(4)), kv_head_groups_kept=1))
    assert refused(four, replace(MODEL, q_heads=14, kv_heads=2)) == (
        "stage 1: 4 ranks do not divide 14 query heads and 2 KV heads",
    )
    assert layout_of(four, 0, replace(MODEL, q_heads=12, kv_heads=2)).tensor_parallel == 4


def test_a_plan_of_another_model_is_refused_with_the_differences() -> None:
    documents = {"model": {"name": "big", "num_layers": 4, "hidden": 128, "q_heads": 16, "kv_heads": 4, "head_dim": 8}}
    plan = replace(plan_of(stage_of(kv_head_groups_kept=8)), inputs={"documents": documents})
    assert refused(plan) == ("the plan is of another model (big): kv_heads 4, not 8, vocab None, not 512",)


def test_latent_attention_has_no_heads_to_place_and_kv_of_a_byte_no_worker() -> None:
    mla = shape_of(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    plan = plan_of(stage_of(), pools=(POOL,))
    latent = replace(MODEL, mla=mla)
    why = "attention is latent (MLA), and its KV cannot be split into head groups"
    assert refused(plan, latent) == (f"it has attention workers, which tiny cannot have: {why}",)
    assert refused(plan, replace(MODEL, kv_bytes=1.0)) == (
        "the plan needs KV of 1 bytes per element, workers support 2 or 4: set --dtype",
    )
    assert layout_of(plan, 0, replace(MODEL, kv_bytes=1.0), dtype="bfloat16").workers


def test_pools_of_a_stage_make_its_cards_together() -> None:
    other = AttentionWorkerPool(stage=0, gpu="P100", devices=("d/0",), kv_head_groups=2)
    layout = layout_of(plan_of(stage_of(), pools=(replace(POOL, kv_head_groups=4), other)), 0, MODEL)
    assert [(p.name, p.kv_bytes) for p in layout.attention_workers] == [
        (name, 2 * 4 * LAYER_BYTES) for name in ("b/0", "b/1", "d/0")
    ]


ALONE = plan_of(stage_of(kv_head_groups_kept=8))
SPLIT = (
    stage_of(num_layers=3, kv_head_groups_kept=8),
    stage_of(first_layer=3, num_layers=1, devices=("c/0",), kv_head_groups_kept=8),
)


def test_only_our_plugin_has_attention_workers() -> None:
    for engine, program in ((Engine.VLLM, "vLLM"), (Engine.SGLANG, "SGLang")):
        unsupported = "SGLang does not support; " if engine is Engine.SGLANG else ""
        assert refused(plan_of(stage_of(), pools=(POOL,)), engine=engine) == (
            f"it has attention workers, which {unsupported}vLLM only supports with hetis' plugin (engine vllm-hetis)",
        )
        layout = layout_of(ALONE, 0, MODEL, engine=engine)
        assert [(p.name, p.kind.value) for p in layout.processes] == [(program.lower(), "server")]


def test_prefill_and_decode_apart_take_what_the_connectors_take() -> None:
    for engine in Engine:
        prefill = layout_of(plan_of(*SPLIT, role=Role.PREFILL, micro_batch=0, in_flight=3), 0, MODEL, engine=engine)
        assert (prefill.role, prefill.seats, prefill.chunk_tokens, prefill.micro_batch) == (Role.PREFILL, 3, 32, 0)
        whole = plan_of(*ALONE.replicas[0].stages, role=Role.DECODE, chunk_tokens=0)
        decode = layout_of(whole, 0, MODEL, engine=engine)
        assert (decode.role, decode.seats, decode.chunk_tokens) == (Role.DECODE, 4, 0)
    staged_decode = plan_of(*SPLIT, role=Role.DECODE, chunk_tokens=0)
    assert refused(staged_decode, engine=Engine.VLLM) == (
        "it decodes in 2 stages: vLLM's NIXL connector only supports decode replicas with one",
    )
    assert layout_of(staged_decode, 0, MODEL, engine=Engine.SGLANG).layers == (3, 1)
    decoding, whole = staged_decode.replicas[0], ALONE.replicas[0].stages
    for stages, sends, is_refused in (
        (whole, Role.PREFILL, True), (SPLIT, Role.PREFILL, False), (whole, Role.DECODE, False)
    ):  # fmt: skip
        other = plan_of(*stages, role=sends, micro_batch=0, in_flight=3).replicas[0]
        plan = replace(staged_decode, replicas=(decoding, other))
        if is_refused:
            assert refused(plan, engine=Engine.SGLANG) == (
                "it decodes in 2 stages: SGLang needs the same number in prefill replicas, not 1",
            )
        else:
            assert layout_of(plan, 0, MODEL, engine=Engine.SGLANG).servers
    sliding = replace(MODEL, sliding_window=64)
    assert refused(plan_of(*SPLIT, role=Role.PREFILL), sliding, engine=Engine.VLLM) == (
        "it prefills in several stages: vLLM's NIXL connector does not support this with sliding-window layers",
    )
    drafting = replace(MODEL, draft=DraftShape(tokens=1, acceptance=0.5))
    assert refused(plan_of(*SPLIT, role=Role.PREFILL), drafting, engine=Engine.VLLM) == (
        "it prefills in several stages: vLLM's NIXL connector does not support this with a layer that drafts",
    )
    with_states = replace(MODEL, linear=shape_of(layers=2, params=1, state_bytes=1000.0))
    assert refused(plan_of(*SPLIT, role=Role.PREFILL), with_states, engine=Engine.VLLM) == (
        "it prefills in several stages: vLLM's NIXL connector does not support this with layers that keep states",
    )


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
    halves = plan_of(
        stage_of(num_layers=2, kv_head_groups_kept=1),
        stage_of(first_layer=2, num_layers=2, kv_head_groups_kept=1, devices=("a/1",)),
        in_flight=2,
    )
    uneven = plan_of(
        stage_of(num_layers=1, kv_head_groups_kept=1),
        stage_of(first_layer=1, num_layers=3, kv_head_groups_kept=1, devices=("a/1",)),
        in_flight=2,
    )
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


def test_sglang_does_not_draft_in_a_pipeline() -> None:
    drafting = replace(MODEL, draft=DraftShape(tokens=1, acceptance=0.5))
    plan = plan_of(
        stage_of(num_layers=3, kv_head_groups_kept=8),
        stage_of(first_layer=3, num_layers=1, kv_head_groups_kept=8, devices=("a/1",)),
        in_flight=2,
    )
    assert layout_of(plan, 0, drafting, engine=Engine.VLLM).draft_tokens == 1
    with pytest.raises(LayoutError, match="it drafts tokens in 2 stages: SGLang only supports that in one"):
        layout_of(plan, 0, drafting, engine=Engine.SGLANG)


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
    ranks = plan_of(stage_of(tp=4, kv_head_groups_kept=1, num_layers=6, devices=("a/0", "a/1", "a/2", "a/3")))
    found = layout_of(ranks, 0, model).rank_kv_bytes
    assert found is not None
    kv = 6 * PAGES * math.ceil(PAGE_TOKENS * model.kv_bytes_per_token_group() / 2) * 2
    states = 5 * model.state_bytes() + 32 * model.chunk_state_bytes()  # one is being prefilled
    assert found == pytest.approx(kv + 6 * states, abs=1)
    drafting = layout_of(ranks, 0, replace(model, draft=DraftShape(tokens=2, acceptance=0.5))).rank_kv_bytes
    assert drafting == pytest.approx(7 / 6 * found, abs=1), "a layer more, but no state for each draft"
    eight = plan_of(stage_of(tp=8, kv_head_groups_kept=1, num_layers=6, devices=tuple(f"a/{i}" for i in range(8))))
    assert refused(eight, model) == ("stage 1: 8 ranks do not divide the 4 groups of heads in its output projection",)
    halves = (
        stage_of(num_layers=3, kv_head_groups_kept=1),
        stage_of(first_layer=3, num_layers=3, kv_head_groups_kept=1, devices=("a/1",)),
    )
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


def test_every_node_of_the_fleet_is_known_also_those_that_the_plan_leaves_idle() -> None:
    nodes = [{"name": "idle", "count": 2}, {"name": "last"}]
    plan = dataclasses.replace(plan_of(stage_of()), inputs={"documents": {"cluster": {"nodes": nodes}}})
    assert list(unknown_nodes(["a", "idle-0", "idle-1", "last"], plan)) == []
    (error,) = unknown_nodes(["idle-2"], plan)
    assert "did you mean idle-" in error


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
