"""Splitwise's pools: sizes as by enumeration, one kind of machine each, and the rest in the mixed pool."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver.check import check_plan
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.plan import Plan, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.published.splitwise import pool_sizes
from tests.solver.instances import NO_LIMITS, SMALL_FAMILY, make_node, make_problem, make_profile, problems

RATES = st.sampled_from([0.0, 0.3, 1.0, 1.7, 2.0, 5.0])


@given(RATES, RATES, st.integers(0, 9), st.integers(0, 9), st.booleans())
@settings(max_examples=200)
def test_pools_pass_the_most_with_the_fewest_machines(
    prompt_rate: float, token_rate: float, most_prompt: int, most_token: int, is_same: bool
) -> None:
    most_token = most_prompt if is_same else most_token
    sizes = pool_sizes(prompt_rate, token_rate, most_prompt, most_token, is_same=is_same)
    passed = {
        (p, t): min(p * prompt_rate, t * token_rate)
        for p in range(1, most_prompt + 1)
        for t in range(1, most_token + 1)
        if not is_same or p + t <= most_prompt
    }
    best = max(passed.values(), default=0.0)
    if best == 0.0:
        assert sizes == (0, 0)
        return
    assert passed[sizes] == pytest.approx(best)
    fewest = [min(pair[i] for pair, rate in passed.items() if rate >= best * (1 - 1e-9)) for i in (0, 1)]
    assert list(sizes) == fewest


def planned(problem: PlacementProblem) -> Plan:
    plan = solve_placement(problem, strategy="splitwise-paper")
    restricted = replace(problem, family=STRATEGIES["splitwise-paper"].restrict(problem.family))
    assert check_plan(plan, restricted) == ()
    return plan


def test_every_prompt_machine_sends_to_every_token_machine_in_equal_shares() -> None:
    plan = planned(make_problem([make_node("a", "A", gpus=2, nodes=3)]))
    numbers = {
        role: [i for i, one in enumerate(plan.replicas) if one.role is role] for role in (Role.PREFILL, Role.DECODE)
    }
    pairs = {(route.prefill, route.decode) for route in plan.kv_routes}
    assert pairs == {(p, d) for p in numbers[Role.PREFILL] for d in numbers[Role.DECODE]}
    assert len({route.rate for route in plan.kv_routes}) == 1


def test_pools_are_of_one_kind_each_and_what_they_do_not_need_is_mixed() -> None:
    """One strong card prefills for all weak ones, and the other strong ones remain."""
    profiles = {
        "A": make_profile("A", flops=4e13, bytes_per_s=4e11, usable_bytes=60_000_000),
        "B": make_profile("B", flops=1e12, bytes_per_s=4e10, usable_bytes=60_000_000),
    }
    nodes = [make_node("a", "A", nodes=4), make_node("b", "B", nodes=2)]
    plan = planned(make_problem(nodes, profiles=profiles, objective=NO_LIMITS))
    kinds = {
        role: {
            (stage.gpu, stage.tp, len(one.stages)) for one in plan.replicas if one.role is role for stage in one.stages
        }
        for role in (Role.PREFILL, Role.DECODE, Role.UNIFIED)
    }
    assert len(kinds[Role.PREFILL]) == len(kinds[Role.DECODE]) == 1
    assert kinds[Role.UNIFIED] <= kinds[Role.PREFILL] | kinds[Role.DECODE]
    assert kinds[Role.UNIFIED]


def test_without_unified_replicas_there_is_no_mixed_pool_and_with_nothing_else_no_plan() -> None:
    nodes = [make_node("a", "A", gpus=5)]
    apart = replace(SMALL_FAMILY, roles=(Role.PREFILL, Role.DECODE))
    assert {one.role for one in planned(make_problem(nodes, family=apart)).replicas} == set(apart.roles)
    with pytest.raises(NoPlanFoundError, match=r"^splitwise-paper needs prefill and decode replicas$"):
        planned(make_problem(nodes, family=replace(SMALL_FAMILY, roles=(Role.UNIFIED,))))


@settings(max_examples=10)
@given(problem=problems(max_gpus=6))
def test_no_kind_of_machine_is_cut_in_two_ways(problem: PlacementProblem) -> None:
    try:
        plan = planned(problem)
    except NoPlanFoundError:
        return
    by_type: dict[str, set[tuple[int, int]]] = {}
    for one in plan.replicas:
        (gpu,) = {stage.gpu for stage in one.stages}
        by_type.setdefault(gpu, set()).add((one.stages[0].tp, len(one.stages)))
    assert all(len(shapes) == 1 for shapes in by_type.values())
