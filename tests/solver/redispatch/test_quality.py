"""Plans against every possible placement, and the claimed gains of their moves."""

from __future__ import annotations

import numpy as np
import pytest

from hetis.solver.dispatch.dispatch_problem import HeadShape, Stage
from hetis.solver.dispatch.snapshot import DeviceSnapshot, StateSnapshot
from hetis.solver.dispatch.state import DispatchState
from hetis.solver.redispatch.move_search import perturb
from hetis.solver.redispatch.redispatch_problem import MoveReason, RedispatchProblem
from hetis.solver.redispatch.redispatch_tables import horizons, objective_s, tables_of
from hetis.solver.redispatch.redispatcher import solve_redispatch
from tests.solver.dispatch_state.stages import stage
from tests.solver.redispatch import oracle
from tests.solver.redispatch.instances import random_problem


def test_plans_where_memory_is_ample_are_near_the_best_there_are() -> None:
    gaps = list[float]()
    for seed in range(60):
        problem = random_problem(seed, num_devices=3, num_requests=3, head_groups=2, slack=3.0, high_water=1.0)
        best_s = oracle.least_objective_s(problem, horizons=horizons(problem), short_s=tables_of(problem).short_s)
        gaps.append(solve_redispatch(problem).objective_s / best_s - 1)
    # 0.1% and 1.7%; single steps from the rounded relaxation alone reach 0.4% and 10%.
    assert np.mean(gaps) < 0.002
    assert max(gaps) < 0.03


def make_room() -> RedispatchProblem:
    """``big`` is on a slow device. It fits on the fast one once ``small``, which gains nothing, has left that."""
    heads = HeadShape(
        head_groups=1, queries_per_group=4, kv_bytes_per_token=4096.0, exchange_bytes_per_head=640.0, block_tokens=16
    )
    three = Stage(
        heads=heads,
        devices=("slow", "mid", "fast"),
        head_s=np.full((3, 1), 1e-9),
        kv_byte_s=np.array([[1e-10], [5e-12], [5e-13]]),
        call_s=np.full((3, 1), 5e-6),
        transfer_byte_s=np.full(3, 1e-10),
        transfer_s=np.full(3, 5e-6),
    )
    snapshot = StateSnapshot(
        stage=three,
        devices=tuple(
            DeviceSnapshot(name=name, total_blocks=blocks, high_water=1.0)
            for name, blocks in zip(three.devices, (100, 30, 50), strict=True)
        ),
        ids=("big", "small"),
        context_tokens=np.array([640, 240]),
        remaining_tokens=np.array([50, 50]),
        groups=np.array([[1, 0, 0], [0, 0, 1]]),
    )
    return RedispatchProblem(snapshot=snapshot, num_layers=10, link_byte_s=np.full(3, 1e-10))


def test_a_move_that_only_makes_room_is_made_for_the_one_that_needs_it() -> None:
    problem = make_room()
    plan = solve_redispatch(problem)
    assert [(move.request, move.source, move.target, move.wave, move.reason) for move in plan.moves] == [
        ("small", 2, 1, 0, MoveReason.MEMORY),
        ("big", 0, 2, 1, MoveReason.BALANCE),
    ]
    assert plan.refused == ()
    # mid: 10 us for the call and the network, 4 heads of 1 ns and 64 ns exchanged, 240 x 4096 bytes at 5 ps.
    after_s = 10e-6 + 4 * 65e-9 + 240 * 4096 * 5e-12
    assert plan.makespan_after_s == pytest.approx(after_s)
    # Links of 0.1 ns per byte at both ends, paid for within a quarter of 50 steps.
    assert plan.objective_s == pytest.approx(after_s + (640 + 240) * 4096 * 1e-10 / 12.5)


def test_pay_back_is_seconds_copied_over_seconds_saved() -> None:
    state = DispatchState(stage(2), [100, 100])
    state.admit_one("a", context_tokens=40, remaining_tokens=40, groups=np.array([4, 0]))
    plan = solve_redispatch(
        RedispatchProblem(snapshot=state.snapshot(), num_layers=2, link_byte_s=np.array([1e-8, 5e-8]))
    )
    [move] = plan.moves
    assert (move.groups, move.source, move.target) == (2, 0, 1)
    # 2 groups of 40 tokens of 4 bytes in 2 layers, at the slower link.
    copied_s = 2 * 40 * 4 * 2 * 5e-8
    assert move.seconds == pytest.approx(copied_s)
    # Of each group 2 heads of 1 us and 8 bytes exchanged at 1 ns, 40 x 4 bytes read at 1 ns; in each of 2 layers.
    saved_s = 2 * (2 * 1.008e-6 + 160e-9)
    assert move.payback_steps == pytest.approx(copied_s / (2 * saved_s))


def test_all_blocks_on_a_draining_device_are_short_also_under_way() -> None:
    state = DispatchState(stage(3), [100, 100, 100])
    state.admit_one("a", context_tokens=40, remaining_tokens=1, groups=np.array([4, 0, 0]))
    state.admit_one("b", context_tokens=40, remaining_tokens=40, groups=np.array([2, 2, 0]))
    assert state.prepare_move("a", groups=1, source=0, target=1) is not None
    state.drain_device(0)
    plan = solve_redispatch(RedispatchProblem(snapshot=state.snapshot(), num_layers=2, link_byte_s=np.full(3, 1e-12)))
    assert {move.request for move in plan.moves} == {"b"}
    assert plan.short_before == (4 + 2) * 10
    assert plan.short_after == 4 * 10


def test_ruin_and_recreate_stops_at_the_bound_and_improves_above_it() -> None:
    tables = tables_of(make_room())
    x = tables.now.copy()
    now_s = objective_s(tables, x)
    assert perturb(tables, x, 50, now_s, 1) == 1  # no random number is drawn
    assert np.array_equal(x, tables.now)
    assert perturb(tables, x, 50, 0.0, 1) != 1
    assert objective_s(tables, x) < now_s
