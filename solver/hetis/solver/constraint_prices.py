"""The price of every constraint: the objective without it while keeping the others, found by solving again.

The best plan under all constraints has a value between the plan's value and its bound, and the best one without a
constraint has a value between value and bound of its own solve. The price of the constraint is the difference, known
within an interval and never below 0, because whatever keeps all constraints also keeps fewer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hetis.solver.budget import Budget, Report, silent
from hetis.solver.constraints import Constraints
from hetis.solver.errors import HetisError
from hetis.solver.placement.constrained_problem import apply_constraints
from hetis.solver.placement.out_of_reach import rate_bound
from hetis.solver.placement.solve import objective_scale
from hetis.solver.placement.strategies import STRATEGIES
from hetis.solver.placement.tabulation import build_cost_tables
from hetis.solver.plan import Plan
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintPrice:
    """The gain of the objective without some constraints, in its unit: ``least`` to ``most``.

    It comes from solving again if ``is_solved``; otherwise no time was left, and ``most`` is what dense work allows.
    """

    constraints: Constraints
    least: float
    most: float
    is_solved: bool


def price_constraints(
    problem: PlacementProblem,
    plan: Plan,
    *,
    budget: Budget,
    gap_target: float = 0.001,
    seed: int = 0,
    threads: int = 1,
    report: Report = silent,
) -> tuple[ConstraintPrice, ...]:
    """Return the price of each constraint of a problem while keeping the others, and of all together if several.

    Every solve gets an equal part of the time left.
    """
    parts: list[Constraints] = [(each,) for each in problem.constraints]
    if len(parts) > 1:
        parts.append(problem.constraints)
    prices = []
    for number, part in enumerate(parts):
        freed = replace(problem, constraints=tuple(each for each in problem.constraints if each not in part))
        share = budget.share(1.0 / (len(parts) - number))
        price = None if budget.is_spent() else _solved(freed, plan, part, share, gap_target, seed, threads, report)
        prices.append(price if price is not None else _at_once(freed, plan, part))
    return tuple(prices)


def _solved(
    freed: PlacementProblem, plan: Plan, part: Constraints, budget: Budget, gap_target: float, seed: int, threads: int,
    report: Report,
) -> ConstraintPrice | None:  # fmt: skip
    try:
        better = solve_placement(
            freed,
            strategy=plan.strategy,
            budget=budget,
            gap_target=gap_target,
            seed=seed,
            threads=threads,
            report=report,
        )
    except HetisError:
        return None  # stopped before it had a plan, which proves nothing
    sign = 1.0 if plan.objective.maximises else -1.0
    least = sign * (better.result.value - plan.result.bound)
    most = sign * (better.result.bound - plan.result.value)
    return ConstraintPrice(constraints=part, least=max(0.0, least), most=max(0.0, least, most), is_solved=True)


def _at_once(freed: PlacementProblem, plan: Plan, part: Constraints) -> ConstraintPrice:
    """Return a price without a search: no plan serves more than dense work allows, and none is cheaper than free."""
    if not plan.objective.maximises:
        return ConstraintPrice(constraints=part, least=0.0, most=plan.result.value, is_solved=False)
    family = STRATEGIES[plan.strategy].restrict(freed.family)
    costs = build_cost_tables(apply_constraints(replace(freed, family=family)).problem)
    most = objective_scale(freed) * rate_bound(costs) - plan.result.value
    return ConstraintPrice(constraints=part, least=0.0, most=max(0.0, most), is_solved=False)
