"""Searches for a tighter limit, if plans may be for any engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from hetis.planner.use_cases.any_engine import search_again
from hetis.planner.use_cases.sources import engine_rules, load_inputs
from hetis.solver.budget import Budget
from hetis.solver.errors import InfeasibleError, NoPlanFoundError
from hetis.solver.plan import Objective, ObjectiveKind, Plan
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem

INPUTS = load_inputs(
    cluster="examples/paper.yaml", model="Llama-3.1-70B", workload="azure_conv_2023", profiles=()
).inputs
TIGHTENED = Objective(ttft_limit_s=1.33, tpot_limit_s=0.1)

Answer = float | Exception


@pytest.fixture(scope="module")
def best() -> Plan:
    return solve_placement(INPUTS.problem(TIGHTENED, "hetis", (), None))


def problem_for(engine: str, objective: Objective = TIGHTENED) -> PlacementProblem:
    return INPUTS.problem(objective, "hetis", (), engine_rules(engine, "hetis"))


def test_a_replica_of_one_stage_is_as_good_for_any_engine_as_for_one(best: Plan) -> None:
    """Both families let it use all of the TTFT limit, which that for any engine once rounded down by up to a fifth."""
    problem = problem_for("any")
    found = search_again(problem, "hetis", lambda posed, budget: solve_placement(posed, budget=budget), Budget())
    assert found.result.value == pytest.approx(best.result.value, rel=1e-6)
    assert found.family == best.family
    assert {replica.in_flight for replica in found.replicas} <= set(problem.family.in_flight)


@pytest.mark.parametrize("engine", ["vllm-hetis", "vllm"])
def test_plans_for_an_engine_are_searched_once(engine: str, best: Plan) -> None:
    posed = list[PlacementProblem]()

    def search(problem: PlacementProblem, _: Budget) -> Plan:
        posed.append(problem)
        return best

    assert search_again(problem_for(engine), "hetis", search, Budget()) is best
    search_again(problem_for("any"), "hexgen3", search, Budget())
    assert [problem.family.engine is None for problem in posed] == [False, True]


def searching(plan: Plan, *, any_engine: Answer, an_engine: Answer) -> Callable[[PlacementProblem, Budget], Plan]:
    def search(problem: PlacementProblem, budget: Budget) -> Plan:
        answer = any_engine if problem.family.engine is None else an_engine
        assert budget.explains is False
        if isinstance(answer, Exception):
            raise answer
        return replace(plan, family="?", result=replace(plan.result, value=answer))

    return search


@pytest.mark.parametrize(
    ("any_engine", "an_engine", "objective", "value"),
    [
        (2.0, 3.0, TIGHTENED, 3.0),
        (2.0, 1.0, TIGHTENED, 2.0),
        (2.0, 3.0, replace(TIGHTENED, kind=ObjectiveKind.GPUS, demand_rps=1.0), 2.0),
        (2.0, NoPlanFoundError("no time"), TIGHTENED, 2.0),
        (InfeasibleError(("too tight",)), 3.0, TIGHTENED, 3.0),
        (NoPlanFoundError("no time"), InfeasibleError(("too tight",)), TIGHTENED, None),
    ],
)
def test_the_better_plan_counts_and_one_is_enough(
    best: Plan, any_engine: Answer, an_engine: Answer, objective: Objective, value: float | None
) -> None:
    search = searching(best, any_engine=any_engine, an_engine=an_engine)
    budget = Budget(explains=False)
    if value is None:
        with pytest.raises(NoPlanFoundError):
            search_again(problem_for("any", objective), "hetis", search, budget)
    else:
        assert search_again(problem_for("any", objective), "hetis", search, budget).result.value == value
