"""The search for a tighter limit if plans may be for any engine.

The family for any engine excludes some plans that keep a limit on TTFT (`docs/cost-model.md`, "Latency"), so of the
plans that simulated traffic can keep it may lack the best. The family of an engine has exact rules.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from hetis.planner.use_cases.listing import run_by_engine
from hetis.solver.budget import Budget
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.plan import Plan
from hetis.solver.problem import EngineRules, PlacementProblem

SHARE = 0.5  # of the time that is left, for the search of the engine's family; it seldom takes seconds

Search = Callable[[PlacementProblem, Budget], Plan]  # raises InfeasibleError, NoPlanFoundError, InvalidProblemError


def search_again(problem: PlacementProblem, strategy: str, search: Search, budget: Budget) -> Plan:
    """Return the best plan of the problem's family; if that is for any engine, also of those that an engine runs.

    Its bound is that of its own search.

    Raises:
        InfeasibleError: no plan of the family exists.
        NoPlanFoundError: the search stopped before a plan was found.
    """
    of_engine, own = _run_by_an_engine(problem, strategy), None
    if of_engine is not None:
        with suppress(InfeasibleError, NoPlanFoundError, InvalidProblemError):
            own = replace(search(of_engine, budget.share(SHARE)), family=problem.describe_family())
    try:
        plan = search(problem, budget)
    except (InfeasibleError, NoPlanFoundError):
        if own is None:
            raise
        return own
    best = max if problem.objective.maximises else min
    return plan if own is None else best(plan, own, key=lambda one: one.result.value)


def _run_by_an_engine(problem: PlacementProblem, strategy: str) -> PlacementProblem | None:
    """Return the problem of finding what the default engine runs of a family for any engine; None if it is not one.

    An engine has one micro-batch in flight per stage, so pipelines are as deep as the family has all these numbers.
    """
    from hetis.solver.placement.families import DEFAULT_ENGINE, STRATEGIES

    family = problem.family
    if family.engine is not None or not STRATEGIES[strategy].has_engines or problem.model.precisions:
        return None  # the family for any engine has only one precision

    deepest = next(depth for depth in itertools.count(1) if depth + 1 not in family.in_flight)
    return run_by_engine(problem, strategy, EngineRules(name=DEFAULT_ENGINE, max_stages=deepest))
