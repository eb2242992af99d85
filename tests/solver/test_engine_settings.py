"""Plans at an engine's fixed settings: the search finds the best of those that keep to them, the checker no others."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hetis.solver.check import Rule, check_plan
from hetis.solver.errors import InfeasibleError, InvalidProblemError
from hetis.solver.placement.engines import run_by
from hetis.solver.placement.infeasible import why_infeasible
from hetis.solver.placement.specification import solve_specification
from hetis.solver.placement.strategies import STRATEGIES
from hetis.solver.plan import Objective, ObjectiveKind, Plan, Role, Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import MICRO_BATCHES, EngineRules, EngineSettings, Family, PlacementProblem
from tests.solver.instances import SMALL_FAMILY, make_node, make_problem, problems
from tests.solver.oracle import best_plan_value

REL = 1e-6
ON_AN_ENGINE = run_by(
    Family(max_pool=2, tp_sizes=(1, 2), micro_batches=(1, 4, 16), chunk_tokens=(64,)),
    EngineRules(name="vllm-hetis", max_stages=3, max_pooled_stages=2),
)
APART = replace(SMALL_FAMILY, max_copies=1, max_pool=1, tp_sizes=(1, 2), roles=tuple(Role))
UNIFIED = replace(SMALL_FAMILY, roles=(Role.UNIFIED,))

some_settings = st.builds(
    EngineSettings,
    max_num_seqs=st.none() | st.integers(1, 40),
    chunk_tokens=st.sampled_from([(), (32,), (48, 96)]),
    kv_blocks=st.none() | st.integers(5, 400),
)


def at(problem: PlacementProblem, **given: object) -> PlacementProblem:
    """The problem at an engine's settings."""
    return replace(problem, family=problem.family.at(EngineSettings(**given)))  # type: ignore[arg-type]


def solved(problem: PlacementProblem) -> Plan | None:
    """The plan that is found, which the checker accepts and which is proved the best; None: there is none."""
    try:
        plan = solve_placement(problem, strategy=problem.family.name, gap_target=0.0)
    except InfeasibleError:
        return None
    assert check_plan(plan, problem) == ()
    assert plan.result.status is Status.OPTIMAL
    return plan


def value_of(problem: PlacementProblem) -> float:
    plan = solved(problem)
    if plan is None:
        return 0.0 if problem.objective.maximises else math.inf
    return plan.result.value


@given(data=st.data())
def test_the_plan_found_is_the_best_that_brute_force_finds(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from((UNIFIED, ON_AN_ENGINE, APART)))
    most = 3 if family is UNIFIED else 4
    kinds = (ObjectiveKind.GOODPUT,) if family is APART else tuple(ObjectiveKind)
    problem = data.draw(problems(max_gpus=most, kinds=kinds, family=family))
    assume(not problem.model.forbidden_cuts)
    problem = replace(problem, family=family.at(data.draw(some_settings)))
    assert value_of(problem) == pytest.approx(best_plan_value(problem), rel=REL)
