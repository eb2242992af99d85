"""The weights that a GPU loads, and the matching of two plans' replicas."""

from __future__ import annotations

import pytest

from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import DraftShape
from hetis.solver.plan import AttentionWorkerPool, Role
from hetis.solver.planning import solve_placement
from hetis.solver.replanning.change import ChangeCosts, Fate, Holding, holdings, plan_change
from tests.models import replace, shape_of
from tests.solver.instances import SMALL_FAMILY, make_model, make_node, make_problem

MODEL = make_model(num_layers=6)
LAYER = MODEL.layer_params() * MODEL.weight_bytes
TABLE = MODEL.embedding_params * MODEL.embedding_bytes
PROBLEM = make_problem(
    [make_node("n", "A", nodes=3)], model=MODEL, family=replace(SMALL_FAMILY, roles=(Role.UNIFIED,), max_pool=0)
)
MOMENTS = PROBLEM.workload.moments(block_tokens=16)


def shard(first: int, end: int, tp: int = 1, rank: int = 0, gpu: str = "A") -> Holding:
    return Holding(gpu=gpu, first_layer=first, end_layer=end, tp=tp, rank=rank)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (None, shard(0, 6), 6 * LAYER + 2 * TABLE),
        (None, shard(2, 4), 2 * LAYER),
        (shard(0, 4), shard(0, 6), 2 * LAYER + TABLE),  # two layers and the LM head
        (shard(0, 6), shard(0, 4), 0.0),
        (shard(0, 6), shard(0, 6, tp=2), 3 * LAYER + TABLE),  # another shard, all of which is loaded
        (shard(0, 6, tp=2), shard(0, 6, tp=2, rank=1), 3 * LAYER + TABLE),
        (shard(0, 6, gpu="B"), shard(0, 6), 6 * LAYER + 2 * TABLE),  # another GPU of the same name
        (None, shard(0, 6, rank=-1), 0.0),  # an attention worker has no weights
    ],
)
def test_a_gpu_loads_what_it_does_not_have(before: Holding | None, after: Holding, expected: float) -> None:
    assert after.bytes_to_load(MODEL, before) == pytest.approx(expected)


def test_copies_that_share_experts_load_their_part_of_them_and_leading_layers_are_dense() -> None:
    moe = shape_of(num_experts=8, active_experts=2, expert_intermediate=64, shared_experts=1, first_dense_layers=2)
    model = make_model(num_layers=6, moe=moe)
    assert model.prefix_layers == 2
    dense = model.dense_layer_params() * model.weight_bytes
    routed = 8 * model.expert_params() * model.weight_bytes
    whole = model.layer_params() * model.weight_bytes
    for copies, sparse in ((1, whole), (4, whole - 3 / 4 * routed)):
        held = replace(shard(1, 4), attention_dp=copies)
        assert held.bytes_to_load(model, None) == pytest.approx(dense + 2 * sparse)


def test_a_replica_serves_from_its_start_to_the_end_of_the_horizon() -> None:
    costs = ChangeCosts(horizon_s=100.0, restart_s=20.0, load_bytes_per_s=1e9)
    assert costs.start_s(5e9) == 25.0
    assert (costs.served_share(25.0), costs.served_share(200.0)) == (0.75, 0.0)
    for wrong in ({"horizon_s": 0.0}, {"load_bytes_per_s": 0.0}, {"restart_s": -1.0}, {"horizon_s": float("inf")}):
        with pytest.raises(InvalidProblemError, match=f"{next(iter(wrong))} is "):
            replace(costs, **wrong)
    assert replace(costs, restart_s=0.0).start_s(0.0) == 0.0


def test_tied_tables_are_loaded_once() -> None:
    tied = make_model(num_layers=6, tie_embeddings=True)
    assert shard(0, 6).weight_bytes(tied) == pytest.approx(6 * LAYER + TABLE)


def test_a_vision_tower_and_a_drafting_layer_are_loaded_with_the_first_and_the_last_layer() -> None:
    model = replace(MODEL, vision_params=70_000, draft=DraftShape(tokens=1, acceptance=0.5))
    tower, drafting = 70_000 * MODEL.embedding_bytes, LAYER + 2 * MODEL.hidden**2 * MODEL.weight_bytes
    assert shard(0, 6).weight_bytes(model) == pytest.approx(6 * LAYER + 2 * TABLE + tower + drafting)
    assert shard(0, 6).bytes_to_load(model, shard(0, 4)) == pytest.approx(2 * LAYER + TABLE + drafting)
    assert shard(0, 6).bytes_to_load(model, shard(2, 6)) == pytest.approx(2 * LAYER + TABLE + tower)


def test_dropped_requests_lose_their_states_and_the_kv_that_windows_have_left() -> None:
    model = replace(
        MODEL,
        linear=shape_of(layers=2, params=1, state_bytes=1000.0),
        sliding_window=2,
        sliding_layers=2,
    )
    plan = solve_placement(PROBLEM)
    change = plan_change(plan, replace(plan, replicas=()), model, {(): MOMENTS})
    kept = sum(one.planned_seats for one in plan.replicas) * model.cached_tokens(MOMENTS.resident_context)
    states = change.dropped_requests * 2 * 1000
    assert change.dropped_kv_bytes == pytest.approx(kept * model.kv_bytes_per_token() + states)


def test_all_shards_of_a_replica_are_the_model() -> None:
    plan = solve_placement(PROBLEM)
    total = sum(holding.weight_bytes(MODEL) for holding in holdings(plan).values())
    copies = sum(stage.copies for stage in plan.replicas[0].stages) == len(plan.replicas[0].stages)
    assert copies
    assert total == pytest.approx(len(plan.replicas) * (6 * LAYER + 2 * TABLE))


def test_replicas_are_matched_by_what_they_hold_whatever_their_order() -> None:
    plan = solve_placement(PROBLEM)
    assert len(plan.replicas) >= 2
    turned = replace(plan, replicas=plan.replicas[::-1])
    change = plan_change(plan, turned, MODEL, {(): MOMENTS})
    assert {c.fate for c in change.replicas} == {Fate.KEPT}
    assert (change.moved, change.dropped_requests) == ((), 0)


def test_workers_that_several_stages_share_do_not_move_if_nothing_changes() -> None:
    plan = solve_placement(PROBLEM)
    replica = plan.replicas[0]
    [stage] = replica.stages
    stages = (replace(stage, num_layers=1), replace(stage, first_layer=1, num_layers=stage.num_layers - 1))
    stages = (stages[0], replace(stages[1], devices=tuple(f"other/{i}" for i in range(len(stage.devices)))))
    pools = [
        AttentionWorkerPool(stage=i, gpu="B", devices=("w/0", "w/1"), kv_head_groups=1, shared=True) for i in (0, 1)
    ]
    sharing = replace(plan, replicas=(replace(replica, stages=stages, attention_workers=tuple(pools)),))
    change = plan_change(sharing, sharing, MODEL, {(): MOMENTS})
    assert (change.replicas[0].fate, change.replicas[0].moved_gpus, change.moved) == (Fate.KEPT, 0, ())


def test_other_settings_on_the_same_gpus_drop_requests_and_load_nothing() -> None:
    plan = solve_placement(PROBLEM)
    first = plan.replicas[0]
    reset = replace(plan, replicas=(replace(first, micro_batch=first.micro_batch + 1), *plan.replicas[1:]))
    change = plan_change(plan, reset, MODEL, {(): MOMENTS})
    assert change.replicas[0].fate is Fate.RESET
    assert not change.loads
    assert change.dropped_requests == first.planned_seats
    assert change.dropped_kv_bytes == pytest.approx(
        first.planned_seats * MOMENTS.resident_context * MODEL.kv_bytes_per_token()
    )


def test_nothing_of_another_model_is_of_use() -> None:
    plan = solve_placement(PROBLEM)
    wide = replace(MODEL, kv_bytes=2 * MODEL.kv_bytes)
    change = plan_change(plan, plan, wide, {(): MOMENTS}, replaced=MODEL)
    assert (
        change.dropped_kv_bytes == plan_change(plan, replace(plan, replicas=()), MODEL, {(): MOMENTS}).dropped_kv_bytes
    )
    assert change.count(Fate.NEW) == change.count(Fate.GONE) == len(plan.replicas)
    assert set(change.loads) == set(change.moved) == set(holdings(plan))
