"""Searches for tests that compare what is found with what there is."""

from __future__ import annotations

import math

from hetis.solver.budget import Budget
from hetis.solver.errors import InfeasibleError
from hetis.solver.plan import Plan
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem


def plan_or_none(problem: PlacementProblem, strategy: str = "hetis", *, gap_target: float = 0.0) -> Plan | None:
    """Return the plan found; None if there is none. Why there is none is not searched for, which takes far longer."""
    try:
        return solve_placement(problem, strategy=strategy, budget=Budget(explains=False), gap_target=gap_target)
    except InfeasibleError:
        return None


def worth(plan: Plan | None, problem: PlacementProblem) -> float:
    """Return the value of the plan found, or of having none, as `tests.solver.oracle.best_plan_value` does."""
    if plan is not None:
        return plan.result.value
    return 0.0 if problem.objective.maximises else math.inf
