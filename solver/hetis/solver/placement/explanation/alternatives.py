"""Sentences from a search: why other shapes were not chosen, what a simpler plan loses, what was left out."""

from __future__ import annotations

from dataclasses import replace

from hetis.solver.placement.fleet import UNIFIED
from hetis.solver.placement.master import row_costs_of
from hetis.solver.placement.outcome import Outcome, Simplicity
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.template import Template, describe, use_of
from hetis.solver.plan import Plan, Role, RunnerUp, Status
from hetis.solver.problem import PlacementProblem

SAME = 1e-3  # ratio of points to their bound up to which it proves them


def runners_up_of(costs: CostTables, outcome: Outcome, status: Status) -> tuple[RunnerUp, ...]:
    """Return the shapes that came next, each with the reason why a plan of this ``status`` does without it."""
    return tuple(
        RunnerUp(
            shape=_kind(costs, template) + describe(costs, template.stages),
            rate=template.rate,
            reason=_why_not(costs, outcome, template, status),
        )
        for template in outcome.runners_up
    )


def _kind(costs: CostTables, template: Template) -> str:
    """Return what a replica does, unless it serves all of every request."""
    role, classes = _role(costs, template), costs.problem.ranges()[costs.scopes[template.scope].number]
    words = [*classes, *(["requests"] if classes else []), *([] if role is Role.UNIFIED else [role.value])]
    return f"{' '.join(words)}: " if words else ""


def _role(costs: CostTables, template: Template) -> Role:
    return costs.mixes[template.mix].role


def _why_not(costs: CostTables, outcome: Outcome, template: Template, status: Status) -> str:
    objective, use, role = costs.problem.objective, use_of(costs, template), _role(costs, template)
    worth = float(outcome.rate_prices[costs.side_of(template.scope, template.mix)])  # value of a request/s there
    if objective.maximises:
        price = float(outcome.row_prices @ use)
        if price > worth * template.rate * (1.0 + 1e-6):
            own = "own" if role is Role.UNIFIED else role  # requests of a class are worth more or less than others
            is_whole = role is Role.UNIFIED and not costs.scopes[template.scope].number
            half = "" if is_whole else f", its {own} work {worth * template.rate:.4g}"
            return f"its GPUs are worth {price:.4g} requests/s elsewhere{half}"
    else:
        each = float(row_costs_of(costs) @ use) / template.rate
        paid, served = _paid_per_request(costs, outcome), role is Role.UNIFIED
        limit = paid if served else paid * worth / float(outcome.rate_prices[UNIFIED] or 1.0)
        if each > limit * (1.0 + 1e-6):
            plan = "the plan takes" if served else f"{role} work is worth"
            return f"{each:.4g} {objective.unit} per request/s, where {plan} {limit:.4g}"
    if status is Status.OPTIMAL:
        return "fits and is worth its GPUs, but no whole number of it makes a better plan"
    return "fits and is worth its GPUs, but no better plan with it was found"


def _paid_per_request(costs: CostTables, outcome: Outcome) -> float:
    """Return the cost of the plan per request/s served."""
    whole = sum(n * t.rate for t, n in outcome.chosen if _role(costs, t) is Role.UNIFIED)
    return outcome.value / (whole + float(outcome.flows.sum()))


def with_simplicity(plan: Plan, found: Simplicity | None, within: float, best: float) -> Plan:
    """Return the plan with a note on its simplicity, with its bound, and on the loss against the ``best`` value."""
    if found is None:
        return replace(plan, notes=(*plan.notes, f"no simpler plan within {within:.1%} of the best was found in time"))
    gap = (found.points - found.bound) / found.points if found.points else 0.0
    proven = "proven: none has fewer" if gap <= SAME else f"none has fewer than {found.bound:.4g}, gap {gap:.2%}"
    given_up = abs(plan.result.value / best - 1.0) if best else 0.0  # GPUs may cost nothing
    note = (
        f"the simplest plan within {within:.1%} of the best, of {found.points:.4g} points, {proven}: "
        f"{abs(found.missing):.3g} for what is missing without the worst node, {found.several:.3g} for replicas over "
        f"several nodes, {found.shapes:.3g} for shapes; it gives up {given_up:.2%} of "
        f"{best:.4g} {plan.objective.unit}"
    )
    return replace(plan, notes=(*plan.notes, note))


def notes_on_search(problem: PlacementProblem, num_left_out: int) -> tuple[str, ...]:
    """Return what the search left out: parts of prompts, links and ``num_left_out`` sets of nodes."""
    notes = []
    clipped = problem.workload.clipped_to(problem.model.max_position).clipped_ratio
    if clipped > 0:
        notes.append(
            f"{clipped:.1%} of the requests were cut to the model's context of {problem.model.max_position} tokens"
        )
    if num_left_out:
        notes.append(
            f"explicit links differ so much that {num_left_out} sets of nodes were not searched for replicas that "
            "exchange KV: such replicas pay for the slowest links of a larger set, at most of their zone"
        )
    return tuple(notes)
