"""Dispatch places whole head groups, close to the optimum, and proves how close."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.dispatch.certificate import Multipliers, proven_bound
from hetis.solver.dispatch.dispatch_problem import (
    DeviceLoad,
    DispatchPlan,
    DispatchProblem,
    HeadShape,
    Path,
    Requests,
    Resource,
    Stage,
)
from hetis.solver.dispatch.dispatcher import Dispatcher, solve_dispatch
from hetis.solver.dispatch.loaded_stage import LoadedStage, costs_of, running_load
from tests.solver.dispatch.instances import problems, random_problem
from tests.solver.dispatch.oracle import assert_feasible, best_makespan, makespan_of
from tests.solver.dispatch.specification import solve_specification

CLOSE = 1e-9


def check(problem: DispatchProblem, plan: DispatchPlan) -> None:
    """Check what every plan guarantees."""
    assert_feasible(problem, plan.groups, {unplaced.request for unplaced in plan.unplaced})
    assert plan.makespan_s == pytest.approx(makespan_of(problem, plan.groups), rel=CLOSE)
    assert plan.bound_s <= plan.relaxed_s * (1 + CLOSE)
    assert plan.relaxed_s <= plan.makespan_s * (1 + CLOSE)
    assert plan.gap >= 0


def loaded(problem: DispatchProblem) -> LoadedStage:
    return running_load(costs_of(problem.stage), problem.load.heads, problem.load.kv_bytes)


def bound_of(problem: DispatchProblem, plan: DispatchPlan) -> float:
    """Compute the bound again, from the plan's prices alone."""
    placed = np.setdiff1d(np.arange(len(problem.requests.ids)), [unplaced.request for unplaced in plan.unplaced])
    blocks = problem.requests.blocks(problem.stage.heads.block_tokens)
    prices = Multipliers(plan.prices.piece, plan.prices.block_s, plan.prices.nic)
    contexts = problem.requests.context_tokens[placed]
    return proven_bound(loaded(problem), problem.load.free_blocks, contexts, blocks[placed], prices)


@given(problems())
def test_every_plan_is_feasible_and_not_below_its_bound(problem: DispatchProblem) -> None:
    plan = solve_dispatch(problem)
    check(problem, plan)
    assert bound_of(problem, plan) == pytest.approx(plan.bound_s, rel=CLOSE)


@given(problems(max_devices=3, max_requests=2, max_groups=4))
def test_the_optimum_lies_between_bound_and_plan(problem: DispatchProblem) -> None:
    plan = solve_dispatch(problem)
    best = best_makespan(problem)
    if plan.unplaced:
        return
    assert plan.bound_s <= best * (1 + CLOSE)
    assert best <= plan.makespan_s * (1 + CLOSE)


@given(problems(max_devices=3, max_requests=2, max_groups=4))
def test_a_request_is_refused_for_blocks_only_if_no_placement_exists(problem: DispatchProblem) -> None:
    plan = solve_dispatch(problem)
    if any(unplaced.resource is Resource.KV_BLOCKS for unplaced in plan.unplaced):
        assert best_makespan(problem) == np.inf


@given(problems(max_devices=5, max_requests=4, max_groups=4))
def test_fast_and_readable_statement_agree(problem: DispatchProblem) -> None:
    plan = solve_dispatch(problem, tolerance=1e-7)
    if plan.unplaced:
        return
    # Without constants of idle devices it is the plain linear program: lower if there are any, otherwise the same.
    linear = solve_specification(problem, whole=False, constants_of_idle=False).makespan_s
    assert linear <= plan.relaxed_s * (1 + 1e-6)
    if np.all(problem.load.heads > 0):
        assert plan.relaxed_s == pytest.approx(linear, rel=1e-6)
        assert plan.bound_s == pytest.approx(linear, rel=1e-6)


def test_the_bound_of_a_network_card_that_binds_is_tight() -> None:
    # Found by hypothesis: the running workers' network card was counted twice, which weakened the bound.
    rng = np.random.default_rng(5)
    for _ in range(20):
        problem = random_problem(
            rng, num_devices=4, num_requests=2, tp=1, nic_share=1.2, free_ratio=1.5, equal_growth=True
        )
        plan = solve_dispatch(problem, tolerance=1e-7)
        if not plan.unplaced:
            assert plan.bound_s == pytest.approx(plan.relaxed_s, rel=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 12), st.sampled_from(["level", "uneven", "idle"]))
def test_the_chain_is_exact_on_one_piece(seed: int, num_devices: int, num_requests: int, load: str) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, num_devices=num_devices, num_requests=num_requests, load=load)  # type: ignore[arg-type]
    plan = solve_dispatch(problem)
    assert plan.path is Path.CHAIN
    assert plan.bound_s == pytest.approx(plan.relaxed_s, rel=CLOSE)
    by_lp = solve_dispatch(problem, tolerance=-1.0)
    assert by_lp.path is Path.LP
    assert by_lp.relaxed_s == pytest.approx(plan.relaxed_s, rel=CLOSE)
    assert by_lp.bound_s == pytest.approx(plan.relaxed_s, rel=CLOSE)


@given(problems(max_devices=5, max_requests=5), st.floats(0.5, 3.0))
def test_bounds_scale_with_time(problem: DispatchProblem, factor: float) -> None:
    stage = problem.stage
    slower = replace(
        stage,
        head_s=factor * stage.head_s,
        kv_byte_s=factor * stage.kv_byte_s,
        call_s=factor * stage.call_s,
        transfer_byte_s=factor * stage.transfer_byte_s,
        transfer_s=factor * stage.transfer_s,
        primary=stage.primary
        and replace(stage.primary, nic_byte_s=factor * stage.primary.nic_byte_s, nic_s=factor * stage.primary.nic_s),
    )
    plan = solve_dispatch(problem, tolerance=1e-7)
    scaled = solve_dispatch(replace(problem, stage=slower), tolerance=1e-7)
    assert scaled.bound_s == pytest.approx(factor * plan.bound_s, rel=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_more_memory_never_raises_the_relaxation(seed: int) -> None:
    tight = random_problem(np.random.default_rng(seed), num_devices=6, num_requests=5, free_ratio=1.5)
    roomy = replace(tight, load=replace(tight.load, free_blocks=2 * tight.load.free_blocks))
    less, more = solve_dispatch(tight, tolerance=1e-7), solve_dispatch(roomy, tolerance=1e-7)
    if not less.unplaced:
        assert more.bound_s <= less.relaxed_s * (1 + 1e-6)


@given(st.integers(0, 2**32 - 1))
def test_the_order_of_devices_does_not_matter_to_the_relaxation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, num_devices=7, num_requests=4, load="idle")
    order = rng.permutation(7)
    stage, load = problem.stage, problem.load
    turned = DispatchProblem(
        stage=replace(
            stage,
            devices=tuple(stage.devices[i] for i in order),
            head_s=stage.head_s[order],
            kv_byte_s=stage.kv_byte_s[order],
            call_s=stage.call_s[order],
            transfer_byte_s=stage.transfer_byte_s[order],
            transfer_s=stage.transfer_s[order],
        ),
        load=DeviceLoad(heads=load.heads[order], kv_bytes=load.kv_bytes[order], free_blocks=load.free_blocks[order]),
        requests=problem.requests,
    )
    assert solve_dispatch(turned).bound_s == pytest.approx(solve_dispatch(problem).bound_s, rel=CLOSE)


@given(problems(max_devices=6, max_requests=6))
def test_no_multipliers_prove_more_than_is_true(problem: DispatchProblem) -> None:
    plan = solve_dispatch(problem)
    if plan.unplaced or not len(problem.requests.ids):
        return
    rng = np.random.default_rng(len(problem.requests.ids))
    blocks = problem.requests.blocks(problem.stage.heads.block_tokens)
    for _ in range(20):
        piece = plan.prices.piece * rng.uniform(0.5, 2.0, plan.prices.piece.shape)
        block = plan.prices.block_s * rng.uniform(0.0, 2.0, len(plan.prices.block_s))
        prices = Multipliers(piece, block, float(plan.prices.nic * rng.uniform(0.0, 2.0)))
        contexts = problem.requests.context_tokens
        bound = proven_bound(loaded(problem), problem.load.free_blocks, contexts, blocks, prices)
        assert bound <= plan.makespan_s * (1 + CLOSE)


@given(problems(max_devices=6, max_requests=5))
def test_shadow_prices_are_in_seconds(problem: DispatchProblem) -> None:
    plan = solve_dispatch(problem)
    stage = loaded(problem)
    in_use = stage.open_at <= plan.bound_s
    total = plan.prices.piece[in_use].sum() + plan.prices.nic
    assert total == pytest.approx(1.0) or (total == 0.0 and plan.bound_s == pytest.approx(stage.floor_s))


def test_a_dispatcher_can_be_used_again() -> None:
    rng = np.random.default_rng(7)
    problem = random_problem(rng, num_devices=12, num_requests=8, free_ratio=1.3)
    dispatcher = Dispatcher(problem.stage)
    first = dispatcher.dispatch(problem.load, problem.requests)
    dispatcher.dispatch(DeviceLoad.idle(np.full(12, 10**6)), problem.requests)
    again = dispatcher.dispatch(problem.load, problem.requests)
    assert np.array_equal(first.groups, again.groups)
    assert first.bound_s == again.bound_s


def test_two_equal_cards_share_a_request_evenly() -> None:
    # 8 groups of one query head, 1 us each, 10 us per call: 4 groups on each of both idle cards end after 14 us.
    # Fractions are no better, so the bound is tight; all groups on one card would take 18 us.
    stage = Stage(
        heads=HeadShape(head_groups=8, queries_per_group=1, kv_bytes_per_token=0.0, exchange_bytes_per_head=0.0),
        devices=("a", "b"),
        head_s=np.full((2, 1), 1e-6),
        kv_byte_s=np.zeros((2, 1)),
        call_s=np.full((2, 1), 1e-5),
        transfer_byte_s=np.zeros(2),
        transfer_s=np.zeros(2),
    )
    requests = Requests(ids=("r",), context_tokens=np.array([100]), growth_tokens=np.array([0]))
    plan = solve_dispatch(DispatchProblem(stage=stage, load=DeviceLoad.idle(np.array([1000, 1000])), requests=requests))
    assert plan.groups.tolist() == [[4, 4]]
    assert plan.makespan_s == pytest.approx(14e-6, rel=CLOSE)
    assert plan.bound_s == pytest.approx(14e-6, rel=CLOSE)
