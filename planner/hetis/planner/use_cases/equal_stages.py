"""Replicas of equal stages, which engines run without a planner: what a plan is compared with."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hetis.planner.use_cases.grouping import shapes_of
from hetis.planner.use_cases.service_level import SERVICE_LEVEL
from hetis.planner.use_cases.tightening import EQUAL_STAGES_CHOSEN, is_other_than_best, verified_plan
from hetis.planner.use_cases.verification import promising, verification_of
from hetis.planner.use_cases.verify import RunReport
from hetis.solver.budget import Budget, SearchSettings
from hetis.solver.constraints import WithoutTp
from hetis.solver.errors import HetisError
from hetis.solver.plan import ObjectiveKind, Plan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.search_clock import search_seconds

EQUAL_STAGES = "equal_stages_value"  # entry of `Plan.inputs`: the value of `uniform`, null if it has no plan
EQUAL_STAGES_KEPT = "equal_stages_kept_rps"  # entry of `Plan.inputs`: the rate that its plan keeps in simulation
SIMPLE_SETUPS = "simple_setups"  # entry of `Plan.inputs`: the value of equal stages by TP size of all replicas
UNIFORM = "uniform"  # the strategy
SEARCH_S = 5.0  # time limit of each search


def budget_of_one(cancelled: threading.Event) -> Budget:
    """Return a budget, starting now, for a search."""
    return Budget(time_limit_s=SEARCH_S, clock=search_seconds, cancelled=cancelled)


def value_within(budget: Budget, problem: PlacementProblem, seed: int) -> tuple[float | None] | None:
    """Return the value of equal stages in a tuple, which contains None if they have no plan; None: the budget ran out.

    A search that is cut short shows nothing of what equal stages can reach.
    """
    from hetis.solver.placement.solve import equal_stages_value

    if budget.is_spent():
        return None
    value = equal_stages_value(problem, SearchSettings(budget=budget, seed=seed))
    return None if budget.is_spent() else (value,)


def with_values(plan: Plan, problem: PlacementProblem, seed: int, cancelled: threading.Event) -> Plan:
    """Return the plan with the value of equal stages, and the values with one TP size in all replicas, by size.

    Values whose search was cut short are left out. The first search may be cut short only because it compiles, and is
    then repeated.

    Raises:
        BrokenProofError: equal stages, which the plan's family contains, are better than its bound.
    """

    from hetis.solver.placement.outcome import sound_bound

    def value(of: PlacementProblem, budget: Budget) -> tuple[float | None] | None:
        return value_within(budget, of, seed)

    best = value(problem, budget_of_one(cancelled)) or value(problem, budget_of_one(cancelled))
    if best and best[0] is not None and Role.UNIFIED in problem.family.roles:
        sound_bound(plan.result.bound, best[0], maximises=problem.objective.maximises)
    most = max(slots.count for group in problem.cluster.node_groups for slots in group.gpus)
    forbidden = {each.tp for each in problem.constraints if isinstance(each, WithoutTp)}
    freely = replace(
        problem,
        constraints=tuple(each for each in problem.constraints if not isinstance(each, WithoutTp)),
    )
    of_sizes = budget_of_one(cancelled)
    by_size = {
        str(tp): value(replace(freely, family=replace(problem.family, tp_sizes=(tp,))), of_sizes)
        for tp in problem.family.tp_sizes
        if tp <= most and tp not in forbidden
    }
    found: dict[str, Any] = {SIMPLE_SETUPS: {size: one[0] for size, one in by_size.items() if one}}
    return replace(plan, inputs={**plan.inputs, **({EQUAL_STAGES: best[0]} if best else {}), **found})


def with_kept_rate(
    plan: Plan, problem: PlacementProblem, *, seed: int, cancelled: threading.Event, report: RunReport
) -> Plan:
    """Return a simulated plan with the rate that equal stages keep in simulation, if it promises less than the model.

    Then the model may promise too much of equal stages, too. They are simulated like plans that are not searched again
    (`verified_plan`), with the same traffic. If this is cancelled, the plan is returned as it is.
    """
    alone, simulated = plan.inputs.get(EQUAL_STAGES), verification_of(plan)
    if plan.objective.kind is not ObjectiveKind.GOODPUT or Role.UNIFIED not in problem.family.roles:
        return plan
    if simulated is None or (simulated.kept and not is_other_than_best(plan)) or not alone:
        return plan
    equal = plan if plan.inputs.get(EQUAL_STAGES_CHOSEN) is True else _plan_of(problem, plan.inputs, seed, cancelled)
    if equal is None:
        return plan
    if shapes_of(equal) != shapes_of(plan):
        problem = replace(problem, objective=equal.objective)
        equal = verified_plan(equal, problem, None, seed=seed, cancelled=cancelled, report=report)
        simulated = verification_of(equal)
        if simulated is None or cancelled.is_set():
            return plan
    kept_rps = min(equal.result.value, simulated.kept_rps or 0.0)
    return replace(plan, inputs={**plan.inputs, EQUAL_STAGES_KEPT: kept_rps})


def kept_by_equal_stages(plan: Plan) -> float | None:
    """Return what `with_kept_rate` stored; None: nothing, or what is unreadable."""
    found = plan.inputs.get(EQUAL_STAGES_KEPT)
    return float(found) if isinstance(found, int | float) and found >= 0 else None


def other_plan(plan: Plan, problem: PlacementProblem, seed: int, cancelled: threading.Event) -> Plan | None:
    """Return the best plan of equal stages, held to the plan's service level.

    None: these are not in the problem's family, they are the plan's own stages, or none were found in time.
    """
    if Role.UNIFIED not in problem.family.roles:
        return None
    found = _plan_of(problem, plan.inputs, seed, cancelled)
    return None if found is None or shapes_of(found) == shapes_of(plan) else found


def _plan_of(
    problem: PlacementProblem, inputs: Mapping[str, object], seed: int, cancelled: threading.Event
) -> Plan | None:
    """Return the best plan of equal stages, held to the service level in ``inputs``; None: none was found in time."""
    from hetis.solver.placement.families import STRATEGIES
    from hetis.solver.planning import solve_placement

    budget = replace(budget_of_one(cancelled), explains=False)
    uniform = replace(problem, family=STRATEGIES[UNIFORM].restrict(problem.family))
    try:
        found = solve_placement(uniform, strategy=UNIFORM, budget=budget, seed=seed)
    except HetisError:  # a pin may exclude equal stages
        return None
    asked = {SERVICE_LEVEL: inputs[SERVICE_LEVEL]} if SERVICE_LEVEL in inputs else {}
    return None if budget.is_spent() else promising(replace(found, inputs=asked))
