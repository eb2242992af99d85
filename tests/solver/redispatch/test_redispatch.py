"""Re-dispatch: every plan can be carried out, pays and is bounded, and no other follows while nothing changes."""

from __future__ import annotations

from dataclasses import replace

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.dispatch.snapshot import DeviceStatus, StateSnapshot
from hetis.solver.dispatch.state import DispatchState
from hetis.solver.errors import InvalidProblemError
from hetis.solver.redispatch.joint_relaxation import MoveLp, relax
from hetis.solver.redispatch.move_search import MOST_STEPS, improve
from hetis.solver.redispatch.redispatch_problem import MoveReason, RedispatchPlan, RedispatchProblem
from hetis.solver.redispatch.redispatch_tables import card_s, horizons, objective_s, short_blocks, tables_of
from hetis.solver.redispatch.redispatcher import Redispatcher, _MoveSearch, solve_redispatch
from hetis.solver.redispatch.triggers import ideal_dispatch
from tests.solver.redispatch import oracle
from tests.solver.redispatch.instances import problems, random_problem
from tests.solver.redispatch.specification import solve_specification


def carried_out(problem: RedispatchProblem, plan: RedispatchPlan) -> StateSnapshot:
    """Return the stage after all moves, wave by wave: those of a wave are in progress together."""
    state = DispatchState.of(problem.snapshot)
    for wave in sorted({move.wave for move in plan.moves}):
        under_way = []
        for move in plan.moves:
            if move.wave == wave:
                prepared = state.prepare_move(move.request, groups=move.groups, source=move.source, target=move.target)
                assert prepared is not None, "no room"
                under_way.append(prepared.number)
        state.commit_moves(*under_way)
        state.check_invariants()
    return state.snapshot()


@given(problems())
def test_plans_can_be_carried_out_in_order_and_lead_where_they_say(problem: RedispatchProblem) -> None:
    plan = solve_redispatch(problem)
    waves = [move.wave for move in plan.moves]
    assert waves == sorted(waves)
    after = carried_out(problem, plan)
    tables = tables_of(problem)
    assert objective_s(tables, after.groups) == pytest.approx(plan.objective_s, rel=1e-9, abs=1e-12)
    assert oracle.makespan_s(after, after.groups) == pytest.approx(plan.makespan_after_s, rel=1e-9, abs=1e-12)
    assert plan.objective_s <= plan.stay_s * (1 + 1e-12)
    assert plan.bound_s <= plan.objective_s * (1 + 1e-6) + 1e-12
    assert plan.num_bytes <= problem.budget_bytes * (1 + 1e-9)


@given(problems())
def test_one_move_after_the_other_fits_as_well(problem: RedispatchProblem) -> None:
    state = DispatchState.of(problem.snapshot)
    plan = solve_redispatch(problem)
    for together in dict.fromkeys(move.together for move in plan.moves):
        numbers = []
        for move in plan.moves:
            if move.together == together:
                prepared = state.prepare_move(move.request, groups=move.groups, source=move.source, target=move.target)
                assert prepared is not None
                numbers.append(prepared.number)
        state.commit_moves(*numbers)


@given(problems())
def test_moves_for_speed_pay_back_while_their_request_lives(problem: RedispatchProblem) -> None:
    remaining = dict(zip(problem.snapshot.ids, problem.snapshot.remaining_tokens.tolist(), strict=True))
    for move in solve_redispatch(problem).moves:
        if move.reason is MoveReason.BALANCE:
            assert move.payback_steps is not None
            assert move.payback_steps <= max(1, problem.patience * remaining[move.request]) * (1 + 1e-6)


@given(problems(), st.sampled_from([0.02, 0.1, 0.5]))
def test_moves_save_the_share_that_is_asked_unless_they_make_room(problem: RedispatchProblem, share: float) -> None:
    problem = replace(problem, least_gain=share)
    plan, tables = solve_redispatch(problem), tables_of(problem)
    if plan.moves and not short_blocks(tables, tables.now).any():
        before_s = oracle.makespan_s(problem.snapshot, problem.snapshot.groups)
        assert plan.stay_s - plan.objective_s >= share * before_s * (1 - 1e-9)


@given(problems(max_devices=4, max_requests=6))
def test_local_search_ends_where_no_shift_of_one_request_helps(problem: RedispatchProblem) -> None:
    tables = tables_of(replace(problem, budget_bytes=np.inf))
    x = tables.now.copy()
    assert improve(tables, x) < MOST_STEPS
    reached_s = objective_s(tables, x)
    for j, i, k in np.ndindex(len(x), x.shape[1], x.shape[1]):
        unit, moved = max(tables.unit[i], tables.unit[k]), x[j, i] - tables.now[j, i]
        for n in {int(unit), int(moved)}:
            there = x[j, k] + n - tables.now[j, k]
            is_shift = i != k and 0 < n <= x[j, i] and n % unit == 0 and (there <= 0 or tables.takes[k])
            if is_shift and tables.blocks @ x[:, k] + n * tables.blocks[j] <= tables.room[k]:
                y = x.copy()
                y[j, i], y[j, k] = y[j, i] - n, y[j, k] + n
                assert objective_s(tables, y) >= reached_s * (1 - 1e-8)


def test_a_single_group_on_workers_takes_the_time_of_the_network_card() -> None:
    tables = tables_of(random_problem(1, num_devices=3, num_requests=4, tp=1))
    assert tables.nic_base > 0.0
    assert card_s(tables, float(-tables.on_workers)) == 0.0
    assert card_s(tables, float(1 - tables.on_workers)) == pytest.approx(
        tables.nic_base + tables.nic_group_s * (1 - tables.on_workers)
    )


@given(problems(least_gain=0.01))
def test_nothing_moves_again_while_nothing_changes(problem: RedispatchProblem) -> None:
    if np.isfinite(problem.budget_bytes):  # a spent budget forbids moves that a new one allows
        problem = replace(problem, budget_bytes=np.inf)
    after = carried_out(problem, solve_redispatch(problem))
    again = solve_redispatch(replace(problem, snapshot=after))
    assert again.moves == ()


@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([None, 1, 2]), st.sampled_from([0.0, 0.3, 2.0]))
def test_optimum_lies_between_bound_and_plan(seed: int, draining: bool, tp: int | None, slack: float) -> None:
    problem = random_problem(
        seed, num_devices=3, num_requests=2, head_groups=4, pieces=2, tp=tp, draining=draining, slack=slack
    )
    tables, times = tables_of(problem), horizons(problem)
    optimum_s = oracle.least_objective_s(problem, horizons=times, short_s=tables.short_s)
    plan = solve_redispatch(problem)
    assert plan.bound_s <= optimum_s * (1 + 1e-6)
    assert optimum_s <= plan.objective_s * (1 + 1e-6)
    stays = oracle.objective_s(problem, problem.snapshot.groups, horizons=times, short_s=tables.short_s)
    assert plan.stay_s == pytest.approx(stays, rel=1e-9)


@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([None, 1, 2]), st.sampled_from([0.1, np.inf]))
def test_the_program_is_that_of_the_specification(
    seed: int, draining: bool, tp: int | None, budget_share: float
) -> None:
    problem = random_problem(
        seed, num_devices=4, num_requests=5, head_groups=4, pieces=2, tp=tp, draining=draining,
        slack=0.3, budget_share=budget_share,
    )  # fmt: skip
    tables = tables_of(problem)
    ideal = ideal_dispatch(problem.snapshot, Dispatcher(problem.snapshot.stage), on_draining=True)
    everything = np.ones(4, np.bool_)
    start = relax(tables, MoveLp(), floor_s=ideal.bound_s, guess=ideal.prices.piece).prices
    fast = MoveLp().solve(tables, everything, start)
    assert fast is not None
    stated = solve_specification(problem, horizons=horizons(problem), short_s=tables.short_s, open_devices=everything)
    assert fast.value_s == pytest.approx(stated, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_plans_of_loaded_stages_are_near_their_bound(seed: int) -> None:
    problem = random_problem(seed, num_devices=8, num_requests=60, head_groups=8, tp=2, slack=2.0)
    assert solve_redispatch(problem).gap < 0.02


@given(st.integers(0, 2**32))
def test_a_draining_device_is_emptied_where_there_is_room(seed: int) -> None:
    problem = random_problem(
        seed, num_devices=4, num_requests=8, slack=4.0, draining=True, high_water=1.0, least_gain=0.01
    )
    plan = solve_redispatch(problem)
    after = carried_out(problem, plan)
    [draining] = [i for i, device in enumerate(after.devices) if device.status is DeviceStatus.DRAINING]
    if plan.short_after == 0:
        assert not after.groups[:, draining].any()
    for move in plan.moves:
        assert move.target != draining
        if move.source == draining:
            assert move.reason is MoveReason.DRAIN


@given(st.integers(0, 2**32))
def test_a_full_device_gets_blocks_free_where_others_have_room(seed: int) -> None:
    problem = random_problem(seed, num_devices=4, num_requests=12, head_groups=8, slack=2.0)
    full = int(problem.snapshot.used_blocks().argmax())
    before = problem.snapshot.used_blocks()[full]
    plan = solve_redispatch(replace(problem, full=frozenset({full})))
    after = carried_out(problem, plan)
    if plan.short_after == 0 and before:
        assert after.used_blocks()[full] < before
    with pytest.raises(InvalidProblemError, match=r"full devices are \[4\], the stage has 4 devices"):
        replace(problem, full=frozenset({4}))


def test_an_empty_stage_stays_empty() -> None:
    plan = solve_redispatch(random_problem(0, num_devices=3, num_requests=0))
    assert plan.moves == ()
    assert plan.makespan_after_s == plan.bound_s == plan.gap == 0.0


def test_groups_under_way_are_left_alone() -> None:
    problem = random_problem(3, num_devices=4, num_requests=8, slack=2.0)
    state = DispatchState.of(problem.snapshot)
    j, i = np.argwhere(problem.snapshot.groups > 0)[0]
    move = state.prepare_move(problem.snapshot.ids[j], groups=1, source=int(i), target=int((i + 1) % 4))
    assert move is not None
    under_way = replace(problem, snapshot=state.snapshot())
    plan = solve_redispatch(under_way)
    after = carried_out(under_way, plan)
    assert [m.number for m in after.moves] == [move.number]
    assert plan.bound_s <= plan.objective_s * (1 + 1e-6)


def test_a_solver_is_reused() -> None:
    problem = random_problem(5, num_devices=5, num_requests=20, slack=1.0)
    solver = Redispatcher(Dispatcher(problem.snapshot.stage))
    first, second = solver.solve(problem), solver.solve(problem)
    assert first == second


def test_numbers_given_as_integers_compile_nothing_anew() -> None:
    problem = random_problem(1, num_devices=2, num_requests=1)
    given_bytes = [tables_of(replace(problem, budget_bytes=most)) for most in (1e9, 10**9)]
    assert numba.typeof(given_bytes[0]) == numba.typeof(given_bytes[1])


@given(problems(max_devices=4, max_requests=8), st.sampled_from([0.01, 0.2]))
def test_what_is_proved_not_to_gain_would_not_have_moved(problem: RedispatchProblem, least_gain: float) -> None:
    problem = replace(problem, least_gain=least_gain)
    plan = solve_redispatch(problem)
    with pytest.MonkeyPatch.context() as patch:
        # Every round solves its linear program and goes on from it.
        patch.setattr(_MoveSearch, "_least_gain_s", lambda self, tables: -np.inf)
        thorough = solve_redispatch(problem)
    assert plan.moves == thorough.moves
    assert plan.bound_s <= thorough.bound_s * (1 + 1e-9)
    enough_s = least_gain * plan.makespan_before_s
    assert plan.bound_s >= min(thorough.bound_s, plan.stay_s - enough_s) - 1e-12


def test_a_stage_as_dispatched_needs_no_linear_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a linear program is solved")

    problem = random_problem(3, num_devices=4, num_requests=40, least_gain=0.01, high_water=1.0)
    ideal = ideal_dispatch(problem.snapshot, Dispatcher(problem.snapshot.stage))
    at_rest = replace(problem, snapshot=replace(problem.snapshot, groups=ideal.groups))
    monkeypatch.setattr(MoveLp, "solve", refuse)
    assert solve_redispatch(at_rest).moves == ()
    with pytest.raises(AssertionError, match="linear program"):
        solve_redispatch(problem)


def test_any_gain_is_enough_where_blocks_are_short() -> None:
    problem = random_problem(5, num_devices=3, num_requests=8, slack=0.02, least_gain=0.5)
    problem = replace(problem, snapshot=replace(problem.snapshot, remaining_tokens=np.full(8, 4000)))
    plan = solve_redispatch(problem)
    assert plan.moves
    assert plan.short_after < plan.short_before
    assert plan.stay_s - plan.objective_s < problem.least_gain * plan.makespan_before_s
