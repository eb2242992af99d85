"""The value of equal stages, which every engine runs."""

from __future__ import annotations

import threading

import pytest

from hetis.planner.use_cases.verification import equal_stages
from hetis.solver.budget import Budget, SearchSettings
from hetis.solver.constraints import Exclude, Selection, Unit, WithoutTp
from hetis.solver.errors import BrokenProofError
from hetis.solver.plan import Role
from hetis.solver.problem import PlacementProblem
from tests.models import replace
from tests.planner import plans
from tests.solver.instances import make_node, make_problem


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
    found = equal_stages.with_values(plans.plan(), make_problem([make_node("a", "A")]), 0, threading.Event())
    assert found.inputs.get("equal_stages_value") == (1.0 if told else None)
    assert found.inputs["simple_setups"]


def test_simple_setups_have_each_tp_size_that_fits_a_node_and_is_not_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    posed = list[PlacementProblem]()

    def equal_stages_value(problem: PlacementProblem, _settings: object) -> float:
        posed.append(problem)
        return max(problem.family.tp_sizes) / 10

    monkeypatch.setattr("hetis.solver.placement.solve.equal_stages_value", equal_stages_value)
    kept, forbidden = Exclude(gpus=Selection(unit=Unit.NODE, name="b-0")), WithoutTp(tp=2)
    problem = make_problem([make_node("a", "A", gpus=4), make_node("b", "B")])
    problem = replace(
        problem, constraints=(kept, forbidden), family=replace(problem.family, tp_sizes=(1, 2, 4, 8))
    )  # fmt: skip
    found = equal_stages.with_values(replace(plans.plan(), inputs={}), problem, 0, threading.Event())
    assert found.inputs == {"equal_stages_value": 0.8, "simple_setups": {"1": 0.1, "4": 0.4}}
    first, *of_sizes = posed
    assert first.constraints == (kept, forbidden)
    assert all(one.constraints == (kept,) for one in of_sizes), "a single size is no other than the forbidden one"


@pytest.mark.parametrize("value", [None, 1e6])
@pytest.mark.parametrize("roles", [(Role.UNIFIED,), (Role.PREFILL, Role.DECODE)])
def test_equal_stages_of_the_family_that_beat_its_bound_break_the_proof(
    monkeypatch: pytest.MonkeyPatch, value: float | None, roles: tuple[Role, ...]
) -> None:
    monkeypatch.setattr("hetis.solver.placement.solve.equal_stages_value", lambda *_: value)
    problem = make_problem([make_node("a", "A")])
    problem = replace(problem, family=replace(problem.family, roles=roles))
    if value is not None and Role.UNIFIED in roles:
        with pytest.raises(BrokenProofError):
            equal_stages.with_values(plans.plan(), problem, 0, threading.Event())
    else:
        found = equal_stages.with_values(plans.plan(), problem, 0, threading.Event())
        assert found.inputs["equal_stages_value"] == value
