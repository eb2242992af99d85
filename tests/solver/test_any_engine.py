"""Plans for any engine: of the family's own replicas, or as an engine runs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from hetis.planner.use_cases.listing import also_listed
from hetis.planner.use_cases.sources import engine_rules, family_of, load_inputs
from hetis.solver import planning
from hetis.solver.budget import Progress, SearchSettings
from hetis.solver.errors import HetisError, InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.plan import Objective, ObjectiveKind, Plan, Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import EngineRules, Family, PlacementProblem

INPUTS = load_inputs(
    cluster="examples/paper.yaml", model="Llama-3.1-70B", workload="azure_conv_2023", profiles=()
).inputs
RATE = Objective(ttft_limit_s=1.33, tpot_limit_s=0.1)
GPUS = replace(RATE, kind=ObjectiveKind.GPUS, demand_rps=0.5)
INFEASIBLE, TOO_LATE = InfeasibleError(("too tight",)), NoPlanFoundError("no time")

Answer = tuple[float, float] | HetisError  # value and bound


@pytest.fixture(scope="module")
def plan() -> Plan:
    return solve_placement(problem_for("any"))


def problem_for(engine: str, objective: Objective = RATE, strategy: str = "hetis") -> PlacementProblem:
    return INPUTS.problem(objective, strategy, (), engine_rules(engine, strategy))


def test_the_best_plan_may_be_one_that_the_rules_of_the_family_exclude(plan: Plan) -> None:
    """Under a limit on TTFT, a stage alone may take 1, 1.25, 1.5625 ... times a mean iteration."""
    problem = problem_for("any")
    alone = solve_placement(replace(problem, family=replace(problem.family, also=None)))
    own = solve_placement(problem_for("vllm-hetis"))
    assert plan.result.value == own.result.value > 1.1 * alone.result.value
    assert plan.family == problem.describe_family()
    assert "; or as vllm-hetis runs them; " in plan.family


def solving(plan: Plan, *, any_engine: Answer, an_engine: Answer) -> Callable[..., Plan]:
    def solve_family(problem: PlacementProblem, settings: SearchSettings, *_: object) -> Plan:
        answer = any_engine if problem.family.engine is None else an_engine
        assert settings.budget.explains is (problem.family.engine is None)
        assert problem.family.also is None
        settings.report(Progress(phase="searching", elapsed_s=0.0, incumbent=1.0, bound=2.0, gap=1.0))
        if isinstance(answer, Exception):
            raise answer
        result = replace(plan.result, value=answer[0], bound=answer[1], status=Status.FEASIBLE)
        return replace(plan, objective=problem.objective, result=result)

    return solve_family


@pytest.mark.parametrize(
    ("objective", "any_engine", "an_engine", "expected"),
    [
        (RATE, (2.0, 2.5), (2.2, 2.2), (2.2, 2.5)),
        (RATE, (2.0, 2.0), (1.0, 2.2), (2.0, 2.2)),
        (RATE, (2.0, 2.0), (2.0, 2.0), (2.0, 2.0)),
        (GPUS, (4.0, 3.0), (3.0, 3.0), (3.0, 3.0)),
        (GPUS, (4.0, 3.0), (5.0, 2.0), (4.0, 2.0)),
        (RATE, INFEASIBLE, (2.0, 2.1), (2.0, 2.1)),
        (RATE, (2.0, 2.1), INFEASIBLE, (2.0, 2.1)),
        (GPUS, TOO_LATE, (3.0, 3.0), (3.0, 0.0)),
        (GPUS, (3.0, 3.0), TOO_LATE, (3.0, 0.0)),
        (GPUS, (3.0, 3.0), InvalidProblemError("too many pipelines to list"), (3.0, 0.0)),
        (RATE, INFEASIBLE, INFEASIBLE, INFEASIBLE),
        (RATE, TOO_LATE, INFEASIBLE, TOO_LATE),
        (RATE, INFEASIBLE, TOO_LATE, INFEASIBLE),
    ],
)
def test_the_better_plan_has_the_wider_bound(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, objective: Objective, any_engine: Answer, an_engine: Answer,
    expected: Answer,
) -> None:  # fmt: skip
    monkeypatch.setattr(planning, "solve_family", solving(plan, any_engine=any_engine, an_engine=an_engine))
    if isinstance(expected, Exception):
        with pytest.raises(type(expected)):
            solve_placement(problem_for("any", objective))
        return
    said = list[Progress]()
    result = solve_placement(problem_for("any", objective), report=said.append).result
    assert (result.value, result.bound) == expected
    assert result.gap == pytest.approx(abs(result.bound / result.value - 1.0))
    assert result.status is (Status.OPTIMAL if result.value == result.bound else Status.FEASIBLE)
    assert [(news.phase, news.bound) for news in said] == [("vllm-hetis: searching", None), ("searching", 2.0)]


def test_without_a_bound_of_one_search_a_rate_has_that_of_dense_work(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "solve_family", solving(plan, any_engine=(0.9, 0.9), an_engine=TOO_LATE))
    result = solve_placement(problem_for("any")).result
    assert 0.9 < result.bound < math.inf
    assert result.bound >= plan.result.bound


def test_only_families_for_any_engine_have_what_one_runs_in_as_many_stages_as_batches_in_flight() -> None:
    assert family_of("hetis").also == EngineRules(name="vllm-hetis", max_stages=4)
    assert [family_of(name).also for name in ("hexgen3", "hetis-paper")] == [None, None]
    assert problem_for("vllm").family.also is None
    with pytest.raises(InvalidProblemError, match="of at most 4 stages"):
        Family(also=EngineRules(name="vllm", max_stages=5))
    assert also_listed(problem_for("any")) == problem_for("any")


def test_pipelines_that_are_too_many_to_list_are_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hetis.planner.use_cases.listing.MOST_LISTED", 2)
    also = also_listed(problem_for("any")).family.also
    assert also is not None
    assert also.max_stages == 1
