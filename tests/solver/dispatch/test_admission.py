"""Admission under short memory: no request that fits is refused, unless the plan states that this is not proved."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver.dispatch.admission import (
    MOST_WORK,
    PLACED,
    SCATTERED,
    SHORT_OF_BLOCKS,
    PackingProblem,
    admit,
    pack_few,
)
from hetis.solver.dispatch.dispatch_problem import (
    MOST_GROUPS,
    DeviceLoad,
    DispatchPlan,
    DispatchProblem,
    HeadShape,
    IntArray,
    Requests,
    Resource,
)
from hetis.solver.dispatch.dispatcher import solve_dispatch
from tests.solver.dispatch.instances import problems, random_problem
from tests.solver.dispatch.oracle import assert_feasible, best_makespan
from tests.solver.dispatch.specification import solve_specification
from tests.solver.dispatch.test_inputs import requests_of, stage_of

MLA = HeadShape(head_groups=1, queries_per_group=16, kv_bytes_per_token=1152.0, exchange_bytes_per_head=640.0)


def subset(problem: DispatchProblem, chosen: list[int]) -> DispatchProblem:
    """Return the problem with these requests only."""
    all_of = problem.requests
    requests = Requests(
        ids=tuple(all_of.ids[j] for j in chosen),
        context_tokens=all_of.context_tokens[chosen],
        growth_tokens=all_of.growth_tokens[chosen],
    )
    return replace(problem, requests=requests)


def beside_those_before(problem: DispatchProblem, plan: DispatchPlan, request: int) -> DispatchProblem:
    """Return the problem of ``request`` with all requests admitted before it."""
    left_out = {unplaced.request for unplaced in plan.unplaced}
    return subset(problem, [j for j in range(request) if j not in left_out] + [request])


def crowded(seed: int, *, num_devices: int, num_requests: int, head_groups: int, ratio: float) -> DispatchProblem:
    """Free blocks of all devices together are ``ratio`` of the need, unevenly spread."""
    return random_problem(
        np.random.default_rng(seed),
        num_devices=num_devices,
        num_requests=num_requests,
        head_groups=head_groups,
        free_ratio=ratio,
        equal_growth=True,
    )


@given(problems(max_devices=3, max_requests=3, max_groups=2))
def test_a_refusal_that_is_proved_is_true(problem: DispatchProblem) -> None:
    plan = solve_dispatch(problem)
    assert_feasible(problem, plan.groups, {unplaced.request for unplaced in plan.unplaced})
    for unplaced in plan.unplaced:
        assert unplaced.missing > 0
        if unplaced.proved:
            assert best_makespan(beside_those_before(problem, plan, unplaced.request)) == np.inf


def fit_by_enumeration(free: list[int], unit: list[int], blocks: list[int], head_groups: int) -> bool:
    """Return whether some split of every request's groups over the devices keeps to all blocks."""
    splits = [
        split for split in itertools.product(*(range(0, head_groups + 1, u) for u in unit)) if sum(split) == head_groups
    ]
    return any(
        all(sum(b * row[i] for b, row in zip(blocks, rows, strict=True)) <= max(0, room) for i, room in enumerate(free))
        for rows in itertools.product(splits, repeat=len(blocks))
    )


@settings(max_examples=150)
@given(
    st.lists(st.integers(-1, 40), min_size=1, max_size=3),
    st.lists(st.integers(1, 9), min_size=2, max_size=3),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 2),
)
def test_two_or_three_requests_are_refused_only_if_they_do_not_fit(
    free: list[int], blocks: list[int], head_groups: int, tp: int, primary: int
) -> None:
    unit = [min(tp, head_groups) if i == primary else 1 for i in range(len(free))]
    primary = primary if primary < len(free) else -1
    verdict, missing, reserved = admit(
        PackingProblem(np.array(free), np.array(unit), primary, np.array(blocks), head_groups)
    )
    admitted = list[int]()
    for j, blocks_of_group in enumerate(blocks):
        together = [*(blocks[k] for k in admitted), blocks_of_group]
        if fit_by_enumeration(free, unit, together, head_groups):
            admitted.append(j)
            assert verdict[j] == PLACED
            assert reserved[j].sum() == head_groups
        else:
            assert verdict[j] in (SHORT_OF_BLOCKS, SCATTERED)
            assert missing[j] > 0
            assert not reserved[j].any()
    assert np.all(np.array(blocks) @ reserved <= np.maximum(0, free))
    assert np.all(reserved % unit == 0)


def test_what_is_left_of_two_full_devices_is_found() -> None:
    # 4 groups of 5 blocks and 4 of 3 fill 17 and 15 blocks only as 5 3 3 3 3 and 5 5 5.
    verdict, _, reserved = admit(PackingProblem(np.array([17, 15]), np.ones(2, np.int64), -1, np.array([5, 3]), 4))
    assert verdict.tolist() == [PLACED, PLACED]
    assert reserved.tolist() == [[1, 3], [4, 0]]


def overlooks(problem: DispatchProblem, plan: DispatchPlan) -> bool:
    """Return whether a request that was refused without a proof fits beside those admitted before it."""
    posed = [beside_those_before(problem, plan, one.request) for one in plan.unplaced if not one.proved]
    return any(np.isfinite(solve_specification(one, whole=True, time_limit_s=5.0).makespan_s) for one in posed)


FAMILIES = [(8, 12, 8, 1.05), (8, 12, 8, 1.2), (1, 12, 16, 1.05), (1, 12, 16, 1.2), (1, 12, 16, 1.5)]


@pytest.mark.parametrize(("head_groups", "num_devices", "num_requests", "ratio"), FAMILIES)
def test_the_fast_path_overlooks_next_to_nothing(
    head_groups: int, num_devices: int, num_requests: int, ratio: float
) -> None:
    overlooked = 0
    for seed in range(60):
        problem = crowded(
            seed, num_devices=num_devices, num_requests=num_requests, head_groups=head_groups, ratio=ratio
        )
        overlooked += overlooks(problem, solve_dispatch(problem))
    assert overlooked <= 1  # at most one of 60


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_a_primary_that_takes_several_groups_is_packed_too(tp: int) -> None:
    overlooked = 0
    for seed in range(40):
        problem = random_problem(
            np.random.default_rng(seed), num_devices=6, num_requests=6, head_groups=8, tp=tp, free_ratio=1.04
        )
        plan = solve_dispatch(problem)
        assert_feasible(problem, plan.groups, {unplaced.request for unplaced in plan.unplaced})
        overlooked += overlooks(problem, plan)
    assert overlooked <= 1  # at most one of 40


def test_a_request_makes_room_for_the_next() -> None:
    # 10 and 5 free blocks for latents of 5 and 10: the second request needs the first device.
    problem = DispatchProblem(
        stage=stage_of(2, heads=MLA), load=DeviceLoad.idle(np.array([10, 5])), requests=requests_of(80, 160)
    )
    plan = solve_dispatch(problem)
    assert plan.groups.tolist() == [[0, 1], [1, 0]]


def test_earlier_requests_are_not_dropped_for_later_ones() -> None:
    # The first request takes the only device with room for it; both later ones would fit without it.
    problem = DispatchProblem(
        stage=stage_of(2, heads=MLA), load=DeviceLoad.idle(np.array([10, 4])), requests=requests_of(96, 96, 80)
    )
    plan = solve_dispatch(problem)
    assert plan.groups.tolist() == [[1, 0], [0, 0], [0, 0]]
    assert [(one.resource, one.proved) for one in plan.unplaced] == [(Resource.WHOLE_GROUPS, True)] * 2


def unlucky() -> tuple[IntArray, IntArray]:
    """Return free blocks and blocks of latents, too many for the fast search to examine."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(40, 100, 64)
    return np.bincount(rng.integers(0, 24, 64), weights=blocks, minlength=24).astype(np.int64), blocks


def test_what_the_fast_path_overlooks_is_said_to_be_unproved() -> None:
    free, blocks = unlucky()  # all of them fit, without a spare block
    problem = DispatchProblem(
        stage=stage_of(24, heads=MLA), load=DeviceLoad.idle(free), requests=requests_of(*(16 * blocks).tolist())
    )
    plan = solve_dispatch(problem)
    unproved = [unplaced for unplaced in plan.unplaced if not unplaced.proved]
    assert unproved
    assert unproved[0].resource is Resource.WHOLE_GROUPS
    assert str(unproved[0]) == (
        f"request {unproved[0].id}: no room was found for {unproved[0].missing} head groups; "
        "that there is none is unproved"
    )


def test_packing_few_requests_of_most_head_groups_is_given_up_at_once() -> None:
    # The work counts G**4 per device, which 64 bits do not hold for the most head groups that are allowed.
    packing = PackingProblem(np.array([10**6, 10**6]), np.array([1, 1]), -1, np.array([9, 9, 10]), MOST_GROUPS)
    assert pack_few(packing, np.arange(3), np.zeros((3, 2), np.int64), MOST_WORK) == (-1, 0)
