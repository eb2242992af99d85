"""Objectives that no search accepts are refused when they are made."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hetis.solver.budget import SearchSettings
from hetis.solver.check import check_plan
from hetis.solver.constraints import AtMost, Sum
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.plan import LEAST_DEMAND_RPS, Objective, ObjectiveKind
from hetis.solver.planning import solve_placement
from hetis.solver.replanning.fresh import search_left_over
from tests.solver.instances import NO_LIMITS, make_node, make_problem


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 0.0])
@pytest.mark.parametrize(
    ("field", "name"),
    [("demand_rps", "demanded rate"), ("ttft_limit_s", "TTFT limit"), ("tpot_limit_s", "TPOT limit")],
)
def test_an_objective_has_finite_numbers_above_zero(field: str, name: str, value: float) -> None:
    given = {"demand_rps": 1.0, field: value}
    with pytest.raises(InvalidProblemError) as caught:
        Objective(kind=ObjectiveKind.COST, **given)
    assert str(caught.value) == f"the {name} is {value:g}, must be above 0 and finite"


@pytest.mark.parametrize("kind", [ObjectiveKind.COST, ObjectiveKind.GPUS])
def test_the_least_demand_is_met_and_less_is_refused(kind: ObjectiveKind) -> None:
    problem = make_problem(
        [make_node("a", "A", nodes=2)], objective=replace(NO_LIMITS, kind=kind, demand_rps=LEAST_DEMAND_RPS)
    )
    plan = solve_placement(problem)
    assert len(plan.replicas) == 1
    assert check_plan(plan, problem) == ()
    for demand in (0.99 * LEAST_DEMAND_RPS, 1e-9, 1e-300):
        with pytest.raises(InvalidProblemError, match=r"requests/s, must be at least 0\.001"):
            replace(problem.objective, demand_rps=demand)


def test_replanning_serves_what_little_the_others_leave() -> None:
    """A remainder below the least demand is what staying replicas leave, and is not an input."""
    goal = replace(NO_LIMITS, kind=ObjectiveKind.GPUS, demand_rps=1.0)
    costs = build_cost_tables(make_problem([make_node("a", "A", nodes=2)], objective=goal))
    assert len(search_left_over(costs, set(), 1e-9, SearchSettings())) == 1


def test_every_type_without_a_price_is_named_at_once() -> None:
    problem = make_problem([make_node("a", "A", nodes=2), make_node("b", "B"), make_node("c", "B")])
    types = {name: replace(gpu, usd_per_hour=None) for name, gpu in problem.cluster.gpu_types.items()}
    cluster = replace(problem.cluster, gpu_types=types)
    with pytest.raises(InvalidProblemError, match=r"set usd_per_hour in the cluster for A \(node a\), B \(node b\)$"):
        replace(problem, cluster=cluster, objective=Objective(kind=ObjectiveKind.COST, demand_rps=1.0))
    with pytest.raises(InvalidProblemError, match=r"no price is known of A, B"):
        solve_placement(replace(problem, cluster=cluster, constraints=(AtMost(of=Sum.USD, most=9.0),)))
