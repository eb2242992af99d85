"""The result of a plan: its family, value, bound, gap and status."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hetis.solver.check.fleet import Fleet
from hetis.solver.check.routes import served_rate
from hetis.solver.check.violation import Rule, Violation
from hetis.solver.cluster import NodeGroup
from hetis.solver.plan import ObjectiveKind, Plan, Status
from hetis.solver.problem import PlacementProblem

OPTIMAL_GAP = 1e-6
RELATIVE = 1e-6  # rounding of a value or a gap
BOUND_ROUNDING = 1e-9
UNIFIED_ALONE = "; every replica prefills and decodes"


def check_result(plan: Plan, problem: PlacementProblem, fleet: Fleet) -> list[Violation]:
    """Check that the value follows from the replicas, and that bound, gap and status contradict nothing."""
    violations = list(_check_objective(plan, problem))
    violations += _check_family(plan, problem)
    not_finite = list(_check_finite(plan))
    violations += not_finite
    if plan.result.status is Status.INFEASIBLE:
        if plan.replicas:
            violations.append(
                _violation(Rule.STATUS, f"status is infeasible, the plan has {len(plan.replicas)} replicas")
            )
        return violations
    if not not_finite and math.isfinite(served_rate(plan)):
        violations += _check_value(plan, problem, fleet)
        violations += _check_bound(plan, problem)
    return violations


def _violation(rule: Rule, message: str) -> Violation:
    return Violation(rule=rule, where="result", message=message)


def _check_objective(plan: Plan, problem: PlacementProblem) -> Iterator[Violation]:
    wanted, result = problem.objective, plan.result
    if plan.objective != wanted:
        yield _violation(Rule.OBJECTIVE, f"the plan is for {plan.objective}, the problem asks for {wanted}")
    if result.objective is not wanted.kind:
        yield _violation(Rule.OBJECTIVE, f"objective is {result.objective}, must be {wanted.kind}")
    if result.unit != wanted.unit:
        yield _violation(Rule.OBJECTIVE, f"unit is {result.unit}, must be {wanted.unit}")


def _check_family(plan: Plan, problem: PlacementProblem) -> Iterator[Violation]:
    """Check that the bound's family is the one that was searched, in the same words.

    Plans from before the introduction of roles do not mention them: all their replicas are unified.
    """
    family = problem.describe_family()
    if plan.family not in (family, family.removesuffix(UNIFIED_ALONE)):
        yield _violation(Rule.FAMILY, f'family is "{plan.family}", strategy {plan.strategy} searches "{family}"')


def _check_finite(plan: Plan) -> Iterator[Violation]:
    result = plan.result
    for name, value in (
        ("value", result.value),
        ("bound", result.bound),
        ("gap", result.gap),
        ("solve_s", result.solve_s),
    ):
        if not 0 <= value < math.inf:
            yield _violation(Rule.FINITE, f"{name} is {value}, must be finite and >= 0")
    for price in plan.prices:
        if not 0 <= price.dual < math.inf:
            message = f"dual of {price.gpu} in {price.zone} is {price.dual}, must be finite and >= 0"
            yield _violation(Rule.FINITE, message)
    for runner_up in plan.runners_up:
        if not 0 <= runner_up.rate < math.inf:
            message = f"rate of the runner-up {runner_up.shape} is {runner_up.rate} requests/s, must be finite and >= 0"
            yield _violation(Rule.FINITE, message)


def _check_value(plan: Plan, problem: PlacementProblem, fleet: Fleet) -> Iterator[Violation]:
    objective, claimed = problem.objective, plan.result.value
    rate = served_rate(plan)
    goodput = problem.assumptions.planned_utilisation * rate
    names = list(dict.fromkeys(name for replica in plan.replicas for name in replica.devices()))
    value = {
        ObjectiveKind.GOODPUT: goodput,
        ObjectiveKind.THROUGHPUT: rate,
        ObjectiveKind.COST: _usd_per_hour(names, fleet),
        ObjectiveKind.GPUS: float(len(names)),
    }[objective.kind]
    if not math.isclose(claimed, value, rel_tol=RELATIVE, abs_tol=1e-12):
        message = f"value is {claimed:.9g} {objective.unit}, {_who(plan)} {value:.9g} {objective.unit}"
        yield _violation(Rule.VALUE, message)
    demand = objective.demand_rps
    if not objective.maximises and demand is not None and goodput < demand * (1 - BOUND_ROUNDING):
        yield _violation(Rule.DEMAND, f"goodput is {goodput:.9g} requests/s, the demand is {demand:.9g} requests/s")


def _who(plan: Plan) -> str:
    return "the replicas and routes give" if plan.kv_routes else "the replicas give"


def _usd_per_hour(names: list[str], fleet: Fleet) -> float:
    """Return the price of these devices; one that does not exist costs nothing (it is reported elsewhere)."""
    total = 0.0
    for name in names:
        device = fleet.devices.get(name)
        if device is not None:
            total += _price_at(fleet, device.group, device.index)
    return total


def _price_at(fleet: Fleet, group: NodeGroup, index: int) -> float:
    """Return the price of the GPU at an index of a node; indices count through the node's slots in order."""
    for slots in group.gpus:
        if index < slots.count:
            return fleet.cluster.price_of(slots) or 0.0
        index -= slots.count
    raise AssertionError(f"node group {group.name} has no GPU {index}")


def _check_bound(plan: Plan, problem: PlacementProblem) -> Iterator[Violation]:
    result = plan.result
    over = result.value - result.bound if problem.objective.maximises else result.bound - result.value
    if over > BOUND_ROUNDING * abs(result.value):
        side = ">=" if problem.objective.maximises else "<="
        message = f"bound is {result.bound:.12g} {result.unit}, must be {side} the value {result.value:.12g}"
        yield _violation(Rule.BOUND, message)
        return
    distance = abs(result.bound - result.value)
    gap = distance / abs(result.value) if result.value else (math.inf if distance else 0.0)
    if not math.isclose(result.gap, gap, rel_tol=RELATIVE, abs_tol=BOUND_ROUNDING):
        yield _violation(Rule.GAP, f"gap is {result.gap:.9g}, |bound - value| / |value| is {gap:.9g}")
    elif result.status is Status.OPTIMAL and gap > OPTIMAL_GAP * (1 + RELATIVE):
        yield _violation(Rule.STATUS, f"status is optimal at a gap of {gap:.9g}, the limit is {OPTIMAL_GAP:.9g}")
