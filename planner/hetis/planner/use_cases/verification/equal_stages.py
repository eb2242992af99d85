"""Replicas of equal stages, which engines run without a planner: what a plan is compared with."""

from __future__ import annotations

import threading
from dataclasses import replace

from hetis.planner.use_cases.record.forms import Searched
from hetis.planner.use_cases.record.parts import EqualStages
from hetis.solver.backends.search_clock import search_seconds
from hetis.solver.budget import WORK_PER_S, Budget, SearchSettings
from hetis.solver.constraints import WithoutTp
from hetis.solver.plan import Plan, Role
from hetis.solver.problem import PlacementProblem

SEARCH_S = 5.0  # of work in each search
GUARD = 5.0  # times the seconds of work after which the clock ends a search, on a busy machine or a slow one


def budget_of_one(cancelled: threading.Event) -> Budget:
    """Return a budget, starting now, for a search."""
    return search_budget(SEARCH_S, cancelled)


def search_budget(limit_s: float, cancelled: threading.Event, guard: float = GUARD) -> Budget:
    """Return a budget, starting now, for a search of the work that takes so long on a usual core."""
    return Budget(
        time_limit_s=guard * limit_s, work_limit=limit_s * WORK_PER_S, clock=search_seconds, cancelled=cancelled
    )


def value_within(budget: Budget, problem: PlacementProblem, seed: int) -> Searched | None:
    """Return the value of equal stages; None: the budget ran out, which shows nothing of what they can reach."""
    from hetis.solver.placement.solve import equal_stages_value

    if budget.is_spent():
        return None
    value = equal_stages_value(problem, SearchSettings(budget=budget, seed=seed))
    return None if budget.is_spent() else Searched(value)


def with_values(plan: Plan, problem: PlacementProblem, seed: int, cancelled: threading.Event) -> Plan:
    """Return the plan with the value of equal stages, and the values with one TP size in all replicas, by size.

    Values whose search was cut short are left out. The first search may be cut short only because it compiles, and is
    then repeated.

    Raises:
        BrokenProofError: equal stages, which the plan's family contains, are better than its bound.
    """

    from hetis.solver.placement.outcome import sound_bound

    def value(of: PlacementProblem, budget: Budget) -> Searched | None:
        return value_within(budget, of, seed)

    best = value(problem, budget_of_one(cancelled)) or value(problem, budget_of_one(cancelled))
    if best is not None and best.value is not None and Role.UNIFIED in problem.family.roles:
        sound_bound(plan.result.bound, best.value, maximises=problem.objective.maximises)
    most = max(slots.count for group in problem.cluster.node_groups for slots in group.gpus)
    forbidden = {each.tp for each in problem.constraints if isinstance(each, WithoutTp)}
    others = tuple(each for each in problem.constraints if not isinstance(each, WithoutTp))
    freely, of_sizes = replace(problem, constraints=others), budget_of_one(cancelled)
    by_size = {
        str(tp): value(replace(freely, family=replace(problem.family, tp_sizes=(tp,))), of_sizes)
        for tp in problem.family.tp_sizes
        if tp <= most and tp not in forbidden
    }
    known = {size: one.value for size, one in by_size.items() if one is not None}
    values = [value for value in known.values() if value is not None]
    if best is not None and best.value is not None and values:  # few utilisations are tried, so the smaller may win
        best = Searched(max(best.value, *values) if problem.objective.maximises else min(best.value, *values))
    return EqualStages(best=best, by_size=known).on(plan)
