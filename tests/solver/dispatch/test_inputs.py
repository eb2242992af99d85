"""Unusual inputs have defined results: a plan, a reason, or an error that names the thing and the limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hetis.formats.documents import load_model
from hetis.solver.dispatch.dispatch_problem import (
    DeviceLoad,
    DispatchPlan,
    DispatchProblem,
    HeadShape,
    Path,
    Primary,
    Requests,
    Resource,
    Stage,
)
from hetis.solver.dispatch.dispatcher import Dispatcher, _admit_and_place, solve_dispatch
from hetis.solver.errors import InvalidProblemError
from tests.solver.dispatch.instances import random_problem
from tests.solver.dispatch.oracle import assert_feasible, makespan_of

HEADS = HeadShape(head_groups=4, queries_per_group=2, kv_bytes_per_token=512.0, exchange_bytes_per_head=640.0)


def stage_of(num_devices: int, *, heads: HeadShape = HEADS, primary: Primary | None = None) -> Stage:
    """Equal cards: 1 ns per head, 1 ps per byte, 10 us per call, 0.1 ns per byte exchanged."""
    ones = np.ones((num_devices, 1))
    return Stage(
        heads=heads,
        devices=tuple(f"d{i}" for i in range(num_devices)),
        head_s=1e-9 * ones,
        kv_byte_s=1e-12 * ones,
        call_s=1e-5 * ones,
        transfer_byte_s=np.full(num_devices, 1e-10),
        transfer_s=np.full(num_devices, 2e-6),
        primary=primary,
    )


def requests_of(*context_tokens: int, growth_tokens: int = 0) -> Requests:
    return Requests(
        ids=tuple(f"r{j}" for j in range(len(context_tokens))),
        context_tokens=np.array(context_tokens, np.int64),
        growth_tokens=np.full(len(context_tokens), growth_tokens),
    )


def solve(stage: Stage, free_blocks: list[int], requests: Requests) -> tuple[DispatchProblem, DispatchPlan]:
    problem = DispatchProblem(stage=stage, load=DeviceLoad.idle(np.array(free_blocks)), requests=requests)
    plan = solve_dispatch(problem)
    assert_feasible(problem, plan.groups, {unplaced.request for unplaced in plan.unplaced})
    assert plan.makespan_s == pytest.approx(makespan_of(problem, plan.groups))
    return problem, plan


def test_no_requests_on_idle_devices_take_no_time() -> None:
    _, plan = solve(stage_of(2), [100, 100], requests_of())
    assert (plan.makespan_s, plan.bound_s, plan.gap, plan.path) == (0.0, 0.0, 0.0, Path.CHAIN)
    assert plan.groups.shape == (0, 2)


def test_no_requests_leave_the_time_of_the_running_ones() -> None:
    problem = random_problem(np.random.default_rng(1), num_devices=3, num_requests=0)
    plan = solve_dispatch(problem)
    assert plan.makespan_s == pytest.approx(makespan_of(problem, plan.groups))
    assert plan.bound_s == plan.makespan_s


def test_a_single_device_takes_everything() -> None:
    _, plan = solve(stage_of(1), [1000], requests_of(500, 100))
    assert plan.groups.tolist() == [[4], [4]]
    assert plan.bound_s == pytest.approx(plan.makespan_s)


@pytest.mark.parametrize("free_blocks", [[0, 0], [-5, 0]])
def test_without_memory_every_request_waits(free_blocks: list[int]) -> None:
    _, plan = solve(stage_of(2), free_blocks, requests_of(16, 33))
    assert [(u.id, u.resource, u.missing) for u in plan.unplaced] == [
        ("r0", Resource.KV_BLOCKS, 4),  # one block for each of 4 groups
        ("r1", Resource.KV_BLOCKS, 12),  # 33 tokens need three blocks
    ]
    assert str(plan.unplaced[1]) == "request r1: 12 KV blocks per layer are missing"
    assert not plan.groups.any()


def test_a_huge_context_waits_and_the_others_are_placed() -> None:
    _, plan = solve(stage_of(2), [100, 100], requests_of(160, 10**9, 320))
    assert [unplaced.id for unplaced in plan.unplaced] == ["r1"]
    # 62,500,000 blocks for each of 4 groups; 200 are free, less 4 * 10 for r0.
    assert plan.unplaced[0].missing == 4 * 62_500_000 - 160


def test_later_requests_wait_first() -> None:
    _, plan = solve(stage_of(2), [40, 40], requests_of(160, 160, 160))
    assert [unplaced.id for unplaced in plan.unplaced] == ["r2"]
    assert plan.unplaced[0].missing == 40


def test_expected_growth_needs_memory_too() -> None:
    _, plan = solve(stage_of(1), [40], requests_of(160, growth_tokens=1))
    assert plan.unplaced[0].missing == 4


def test_scattered_blocks_are_no_room() -> None:
    _, plan = solve(stage_of(3), [14, 14, 14], requests_of(160))
    assert [(u.resource, u.missing) for u in plan.unplaced] == [(Resource.WHOLE_GROUPS, 1)]
    assert str(plan.unplaced[0]) == ("request r0: 1 head groups fit on no device; the free blocks are too scattered")


def test_minus_zero_bytes_are_none() -> None:
    assert replace(DeviceLoad.idle(np.array([1])), kv_bytes=np.array([-0.0])).kv_bytes[0] == 0


def test_the_largest_numbers_allowed_overflow_nothing() -> None:
    _, plan = solve(stage_of(2), [2**40, 2**40], requests_of(2**31, 2**31, growth_tokens=2**31))
    assert not plan.unplaced
    with pytest.raises(InvalidProblemError, match=r"^head_groups is 1.5, must be a whole number >= 1 and <= 65536$"):
        replace(HEADS, head_groups=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [np.float32, np.int64, list, np.asfortranarray])
def test_costs_of_any_type_become_what_kernels_are_compiled_for(kind: Any) -> None:
    zeros = np.zeros((2, 3))
    table: Any = zeros.tolist() if kind is list else kind(zeros)
    stage = replace(stage_of(2), head_s=table, kv_byte_s=table, call_s=table)
    assert all(cost.dtype == np.float64 and cost.flags.c_contiguous for cost in (stage.head_s, stage.call_s))
    compiled = len(_admit_and_place.signatures)  # type: ignore[attr-defined]
    solve(stage, [100, 100], requests_of(100))
    assert len(_admit_and_place.signatures) <= max(1, compiled)  # type: ignore[attr-defined]


def test_costs_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InvalidProblemError, match=r"^head_s is no array of numbers: "):
        replace(stage_of(2), head_s=[["fast"], ["slow"]])  # type: ignore[arg-type]
    with pytest.raises(InvalidProblemError, match=r"^head_s is no array of numbers: "):
        replace(stage_of(2), head_s=[[1.0], [1.0, 2.0]])  # type: ignore[arg-type]


@pytest.mark.parametrize("num", [2, 4])
def test_a_load_of_another_stage_is_refused(num: int) -> None:
    with pytest.raises(InvalidProblemError, match=rf"^the load is of {num} devices, the stage has 3$"):
        Dispatcher(stage_of(3)).dispatch(DeviceLoad.idle(np.full(num, 1000)), requests_of(100))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_primary_takes_whole_multiples_of_its_cards(tp: int) -> None:
    _, plan = solve(stage_of(3, primary=Primary(device=0, tp=tp)), [10_000] * 3, requests_of(4000, 3000, 2000))
    assert plan.groups[:, 0].any()
    assert not np.any(plan.groups[:, 0] % tp)


def test_a_primary_with_more_cards_than_groups_takes_whole_requests() -> None:
    _, plan = solve(stage_of(2, primary=Primary(device=0, tp=8)), [10_000, 10_000], requests_of(4000, 3000, 2000))
    assert set(plan.groups[:, 0].tolist()) <= {0, 4}


def test_a_slow_network_card_keeps_heads_on_the_primary() -> None:
    def on_primary(nic_byte_s: float) -> int:
        primary = Primary(device=0, nic_byte_s=nic_byte_s)
        _, plan = solve(stage_of(3, primary=primary), [10**6] * 3, requests_of(30_000, 20_000, 10_000))
        return int(plan.groups[:, 0].sum())

    shares = [on_primary(seconds) for seconds in (0.0, 1e-8, 1e-6)]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1] == 12


def test_workers_are_left_idle_where_their_constants_exceed_the_level() -> None:
    stage = stage_of(2)
    slow_start = replace(stage, call_s=np.array([[1e-5], [1.0]]))
    _, plan = solve(slow_start, [1000, 1000], requests_of(500))
    assert plan.groups.tolist() == [[4, 0]]
    assert plan.bound_s == pytest.approx(plan.makespan_s)


@pytest.mark.parametrize(("name", "groups"), [("Llama-2-13B", 40), ("Llama-2-70B", 8), ("DeepSeek-V3", 1)])
def test_mha_gqa_and_mla_differ_in_numbers_only(name: str, groups: int) -> None:
    heads = HeadShape.of_model(load_model(name))
    assert heads.head_groups == groups
    _, plan = solve(stage_of(4, heads=heads), [10**6] * 4, requests_of(4000, 3000, 2000, 1000))
    assert not plan.unplaced
    if groups == 1:
        assert np.count_nonzero(plan.groups) == 4  # latent KV is not divided
