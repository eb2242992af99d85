"""One list states what runs where; replicas that vLLM cannot run are refused with every reason."""

from __future__ import annotations

import dataclasses

from hetis.engines.layout import Layout, layout_of
from hetis.engines.planned import KvPartner, kv_partners, unknown_nodes
from hetis.solver.plan import AttentionWorkerPool, KvRoute, Role
from tests.engines.plans import LAYER_BYTES, MODEL, POOL, plan_of, sharing, stage_of, staged
from tests.models import replace


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


def test_pools_of_a_stage_make_its_cards_together() -> None:
    other = AttentionWorkerPool(stage=0, gpu="P100", devices=("d/0",), kv_head_groups=2)
    layout = layout_of(plan_of(stage_of(), pools=(replace(POOL, kv_head_groups=4), other)), 0, MODEL)
    assert [(p.name, p.kv_bytes) for p in layout.attention_workers] == [
        (name, 2 * 4 * LAYER_BYTES) for name in ("b/0", "b/1", "d/0")
    ]


def test_every_node_of_the_fleet_is_known_also_those_that_the_plan_leaves_idle() -> None:
    nodes = [{"name": "idle", "count": 2}, {"name": "last"}]
    plan = dataclasses.replace(plan_of(stage_of()), inputs={"documents": {"cluster": {"nodes": nodes}}})
    assert list(unknown_nodes(["a", "idle-0", "idle-1", "last"], plan)) == []
    (error,) = unknown_nodes(["idle-2"], plan)
    assert "did you mean idle-" in error
