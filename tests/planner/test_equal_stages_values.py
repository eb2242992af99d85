"""The value of equal stages, which every engine runs: other engines are never reported to reach less."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from hetis.planner.use_cases import place
from hetis.planner.use_cases.engine_values import EQUAL_STAGES, EngineValue, _by_equal_stages
from hetis.solver.budget import Budget, SearchSettings
from hetis.solver.problem import EngineRules
from tests.planner import plans
from tests.solver.instances import make_node, make_problem

NO_SEARCH: Any = None  # no search is needed where equal stages are known


@pytest.mark.parametrize(
    ("found", "equal", "told"),
    [(1.0, 1.5, (1.5, True)), (2.0, 1.5, (2.0, False)), (None, 1.5, (1.5, True)), (1.0, None, (1.0, False))],
)
def test_the_better_of_what_was_found_and_equal_stages_is_told(
    found: float | None, equal: float | None, told: tuple[float, bool]
) -> None:
    plan = replace(plans.plan(), inputs={EQUAL_STAGES: equal})
    known = EngineValue(engine="vllm", value=found, bound=None)
    value = _by_equal_stages(known, plan, NO_SEARCH, EngineRules(name="vllm-hetis"), 0, threading.Event())
    assert (value.value, value.equal_stages) == told


@pytest.mark.parametrize(("cut_short", "told"), [(0, True), (1, True), (2, False)])
def test_a_search_that_is_cut_short_twice_says_nothing(
    monkeypatch: pytest.MonkeyPatch, cut_short: int, *, told: bool
) -> None:
    spent = list[Budget]()

    def equal_stages_value(_problem: object, settings: SearchSettings) -> float:
        if len(spent) < cut_short:
            spent.append(settings.budget)
        return 1.0

    monkeypatch.setattr("hetis.solver.placement.solve.equal_stages_value", equal_stages_value)
    monkeypatch.setattr(Budget, "is_spent", lambda self: any(self is one for one in spent))
    found = place._with_equal_stages(
        plans.plan(), make_problem([make_node("a", "A")]), place.PlacementSettings(), threading.Event()
    )
    assert found.inputs.get(EQUAL_STAGES) == (1.0 if told else None)
    assert found.inputs[place.SIMPLE_SETUPS]
