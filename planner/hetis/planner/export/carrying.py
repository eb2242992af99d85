"""Which targets serve all of a plan's traffic, by name, for those who choose a plan by it."""

from __future__ import annotations

from hetis.planner.export.targets import not_carried_by_target
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem


def not_carried(plan: Plan, problem: PlacementProblem) -> dict[str, tuple[str, ...]]:
    """Return for each target why it does not serve all of a plan's traffic; empty: it does."""
    rules = problem.family.engine
    found = not_carried_by_target(
        plan, problem.model, "sglang" if rules is not None and rules.name == "sglang" else None
    )
    return {target.value: reasons for target, reasons in found.items()}
