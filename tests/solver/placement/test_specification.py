"""The search, the compact MILP and the brute-force oracle, written independently, find the same optimum."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings

from hetis.solver.plan import Objective, ObjectiveKind, Role
from hetis.solver.problem import Family, PlacementProblem
from tests.solver.instances import NO_LIMITS, SMALL_FAMILY, make_model, make_node, make_problem, make_profile, problems
from tests.solver.oracle import best_plan_value
from tests.solver.searching import plan_or_none, worth
from tests.solver.specified import EVERY, is_soon_solved, solve_specification

UNIFIED = replace(SMALL_FAMILY, roles=(Role.UNIFIED,), attention_dp=())  # the MILP has no copies that share experts
TINY_FAMILY = replace(UNIFIED, micro_batches=(4,), max_pool=1, tp_sizes=(1, 2))
UNIFORM = replace(TINY_FAMILY, name="uniform", mixed_types=False, uneven_layers=False, max_pool=0)


def specified_value(problem: PlacementProblem) -> float:
    """Return the MILP's value with as many slots as the fleet could fill."""
    slots = problem.cluster.num_gpus()
    return solve_specification(problem, num_replicas=slots, num_stages=slots)


@EVERY
@pytest.mark.parametrize(("strategy", "family"), [("hetis", TINY_FAMILY), ("uniform", UNIFORM)])
def test_search_and_specification_agree_with_brute_force(strategy: str, family: Family, every: bool) -> None:
    num = 20 if every else 6

    @settings(max_examples=num, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(problems(max_gpus=3, kinds=tuple(ObjectiveKind), family=family))
    def agrees(problem: PlacementProblem) -> None:
        assume(every or is_soon_solved(problem))
        best = pytest.approx(best_plan_value(problem), rel=1e-6)
        assert specified_value(problem) == best
        assert worth(plan_or_none(problem, strategy), problem) == best

    agrees()


def pipeline_problem(**changes: object) -> PlacementProblem:
    """A model that fits on no single card: one A and one B, or A with attention workers."""
    nodes = [make_node("a", "A"), make_node("b", "B"), make_node("c", "C")]
    profiles = {
        "A": make_profile("A", usable_bytes=9_000_000),
        "B": make_profile("B", usable_bytes=9_000_000, bytes_per_s=5e9),
        "C": make_profile("C", usable_bytes=3_000_000, bytes_per_s=5e9),
    }
    problem = make_problem(nodes, profiles=profiles, family=TINY_FAMILY, model=make_model(num_layers=6))
    return replace(problem, **changes)  # type: ignore[arg-type]


def test_specification_splits_a_model_over_stages_of_different_types() -> None:
    problem = pipeline_problem()
    value = solve_specification(problem, num_replicas=1, num_stages=3)
    assert value == pytest.approx(best_plan_value(problem), rel=1e-6)
    assert value > 0


def test_specification_respects_forbidden_cuts() -> None:
    free = pipeline_problem()
    cut = replace(free, model=make_model(num_layers=6, forbidden_cuts=frozenset({3, 4, 5})))
    value = solve_specification(cut, num_replicas=1, num_stages=3)
    assert value == pytest.approx(best_plan_value(cut), rel=1e-6)
    assert value < best_plan_value(free)


@pytest.mark.parametrize(("kind", "nothing"), [(ObjectiveKind.GOODPUT, 0.0), (ObjectiveKind.COST, math.inf)])
def test_no_plan_has_a_value(kind: ObjectiveKind, nothing: float) -> None:
    objective = Objective(kind=kind, ttft_limit_s=None, tpot_limit_s=1e-6, demand_rps=1.0)
    problem = make_problem([make_node("a", "A")], family=TINY_FAMILY, objective=objective)
    assert solve_specification(problem, num_replicas=1, num_stages=1) == best_plan_value(problem) == nothing


def test_demand_that_no_plan_meets_is_infeasible() -> None:
    objective = replace(NO_LIMITS, kind=ObjectiveKind.GPUS, demand_rps=1e6)
    problem = make_problem([make_node("a", "A")], family=TINY_FAMILY, objective=objective)
    assert solve_specification(problem, num_replicas=1, num_stages=1) == best_plan_value(problem) == math.inf
