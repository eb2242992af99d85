"""The rate that remains after the loss of a node or a zone, and plans that survive one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from hetis.planner.use_cases.record.parts import Losses, Requested, Surviving
from hetis.solver.advice import worst_loss
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.plan import ObjectiveKind, Plan
from hetis.solver.problem import PlacementProblem

if TYPE_CHECKING:
    from hetis.solver.check.violation import Violation

ENOUGH = 1.0 - 1e-6
MOST_TRIES = 4  # demands that are tried, if GPUs are named so that a node takes more than the search assumed

Find = Callable[[PlacementProblem, float | None], tuple[Plan, float | None]]  # as `solve_surviving`, with what to keep


def with_losses(plan: Plan, problem: PlacementProblem) -> Plan:
    """Return the plan with its worst loss of any one node, and of any one zone."""
    found = {place: worst_loss(plan, problem, place) for place in ("node", "zone")}
    return Losses(by_place={kind: loss for kind, loss in found.items() if loss is not None}).on(plan)


def check_recorded_losses(plan: Plan, problem: PlacementProblem) -> tuple[Violation, ...]:
    """Return what the checker finds wrong with the losses that a plan of valid structure records."""
    from hetis.solver.check.losses import StatedLoss, check_losses
    from hetis.solver.check.violation import Rule, Violation

    losses, survived, place = Losses.of(plan).by_place, Surviving.of(plan), Requested.of(plan).survive
    found = check_losses(
        plan, problem,
        [StatedLoss(place=kind, name=one.name, left=one.rate, whole=one.whole) for kind, one in losses.items()],
    )  # fmt: skip
    if survived.left_rps is None or place not in losses:
        return found
    left = plan.planned_share * losses[place].rate
    needed = problem.objective.demand_rps or (survived.keep or 0.0) * plan.result.value
    wrong = list[str]()
    if not math.isclose(survived.left_rps, left, rel_tol=1e-6, abs_tol=1e-9):
        wrong.append(f"{survived.left_rps:.9g} requests/s are recorded to survive, {left:.9g} do")
    if left < needed * ENOUGH:
        wrong.append(f"{left:.9g} requests/s survive, {needed:.9g} must")
    return (*found, *(Violation(rule=Rule.LOSS, where=f"loss of a {place}", message=message) for message in wrong))


def left_without(plan: Plan, problem: PlacementProblem, place: str) -> float:
    """Return the planned requests/s that remain without the worst ``node`` or ``zone``."""
    lost = worst_loss(plan, problem, place)
    return 0.0 if lost is None else plan.planned_share * lost.rate


def check_survival(problem: PlacementProblem, place: str, keep: float | None) -> None:
    """Check that a problem's zones and objective allow the question.

    Raises InvalidProblemError if not.
    """
    if keep is not None and not place:
        raise InvalidProblemError("--keep needs --survive node or --survive zone")
    if keep is not None and not problem.objective.maximises:
        raise InvalidProblemError(
            f"--keep needs a rate to maximise: objective {problem.objective.kind} keeps its demand"
        )
    if place == "zone" and len(problem.cluster.zones()) < 2:
        raise InvalidProblemError(f"--survive zone: all GPUs of cluster {problem.cluster.name} are in one zone")


def surviving_plan(find: Find, problem: PlacementProblem, place: str, keep: float | None) -> Plan:
    """Return the plan that serves most after the loss of any one ``node`` or ``zone``, or its demand through it.

    With ``keep``, it serves most of all plans of which that share is left. The record has what is left and the bound.

    Raises:
        NoPlanFoundError: no such plan was found.
        InfeasibleError: no plan survives.
    """
    num = len(problem.cluster.zones()) if place == "zone" else problem.cluster.num_nodes()
    if num < 2:
        raise InfeasibleError((f"--survive {place}: the fleet has no other {place}",))
    plan, bound = find(problem, keep)
    demand, first = problem.objective.demand_rps or 0.0, plan.result
    if keep is not None or not problem.objective.maximises:
        plan = _enough(find, problem, place, keep, plan)
    left = left_without(plan, problem, place)
    what = f"{left:.4g} requests/s are left when any one {place} is lost"
    if not problem.objective.maximises:
        plan = replace(plan, objective=problem.objective, result=plan.result.bounded_by(first.bound))
        what += f", of {demand:.4g} that are demanded"
    elif bound is not None:
        what += f"; no plan leaves more than {max(bound, left):.4g}"
    found = Surviving(left_rps=left, bound_rps=None if bound is None else max(bound, left), keep=keep)
    return found.on(replace(plan, notes=(*plan.notes, what)))


def _enough(find: Find, problem: PlacementProblem, place: str, keep: float | None, plan: Plan) -> Plan:
    """Return a plan that leaves what it must, for a larger demand or share if the first one's GPUs share nodes.

    Raises:
        NoPlanFoundError: none was found.
    """
    wanted = factor = 1.0
    for _ in range(MOST_TRIES):
        needed = problem.objective.demand_rps if keep is None else keep * plan.result.value
        left = left_without(plan, problem, place)
        if left >= (needed or 0.0) * ENOUGH:
            return plan
        wanted *= min(2.0, (needed or 0.0) / left if left else 2.0)
        factor = wanted * (1.0 + 1e-6)
        try:
            if keep is None:
                goal = replace(problem.objective, demand_rps=(problem.objective.demand_rps or 0.0) * factor)
                plan, _ = find(replace(problem, objective=goal), None)
            else:
                plan, _ = find(problem, min(1.0, keep * factor))
        except InfeasibleError:
            break
    raise NoPlanFoundError(
        f"no plan was found that survives the loss of any one {place}, nor proved that there is none"
    )


def most_left(find: Find, problem: PlacementProblem, place: str) -> Plan | None:
    """Return the plan that serves most after a loss, whatever is demanded, or None."""
    goal = replace(problem.objective, kind=ObjectiveKind.GOODPUT, demand_rps=None)
    try:
        return surviving_plan(find, replace(problem, objective=goal), place, None)
    except (InfeasibleError, NoPlanFoundError):
        return None
