"""What tests of verified plans share."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from hetis.planner.report.page import key_figures
from hetis.planner.report.plan import headline
from hetis.planner.use_cases.verification.outcome import (
    restated,
)
from hetis.planner.use_cases.verification.rates import (
    kept_plan,
)
from hetis.solver.budget import Budget
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem
from tests.planner.report.test_reports import text_of

Placed = tuple[Plan, PlacementProblem]


def no_progress(_rate_rps: float, _given: int, _total: int) -> None:
    """Report nothing."""


def drawn(plan: Plan) -> str:
    """Return the words of a plan's first lines, however they are wrapped."""
    return " ".join(text_of(headline(plan), width=160).split())


def again(plan: Plan, problem: PlacementProblem) -> Plan:
    return kept_plan(plan, problem, seed=0, budget=Budget(), report=no_progress)


UNCOUNTED = SimpleNamespace(counts=SimpleNamespace(iterations=0, arrived=0))  # metrics of a run that costs nothing


def at_rate(plan: Plan, problem: PlacementProblem, factor: float) -> Plan:
    """Return the plan as if it served so many times its rate."""
    return replace(restated(plan, problem, factor * plan.result.utilisation), inputs={}, notes=())


def page_of(plan: Plan) -> str:
    return " ".join(f"{tile.value} {tile.note}" for tile in key_figures._simulated(plan))
