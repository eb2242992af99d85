"""A solver that finds what a test says."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from hetis.planner.use_cases.climbing import Climbed
from hetis.planner.use_cases.comparing import compare as comparing
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.solver.problem import PlacementProblem
from tests.planner.use_cases.comparing.compared import Outcome, Solver, plan_of


@pytest.fixture
def solver(monkeypatch: pytest.MonkeyPatch) -> Solver:
    """Makes every strategy return a value and a bound, or raise; records the order in which they ran."""

    def answer_with(outcomes: Mapping[str, Outcome]) -> list[str]:
        asked: list[str] = []

        def make_plan(
            _loaded: object, problem: PlacementProblem, settings: PlacementSettings, **_options: object
        ) -> Climbed:
            asked.append(settings.strategy)
            outcome = outcomes[settings.strategy]
            if isinstance(outcome, Exception):
                raise outcome
            return Climbed(plan=plan_of(settings.strategy, *outcome, problem.objective), problem=problem)

        monkeypatch.setattr(comparing, "make_plan", make_plan)
        return asked

    return answer_with
