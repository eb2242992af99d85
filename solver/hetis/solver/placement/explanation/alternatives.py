"""Sentences from a search: why other shapes were not chosen, what a simpler plan loses, what was left out."""

from __future__ import annotations

from dataclasses import replace

from hetis.solver.cluster import node_of
from hetis.solver.placement.fleet import UNIFIED
from hetis.solver.placement.master import row_costs_of
from hetis.solver.placement.outcome import Outcome
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.template import Template, describe, use_of
from hetis.solver.plan import Plan, Role, RunnerUp, Status
from hetis.solver.problem import PlacementProblem


def runners_up_of(costs: CostTables, outcome: Outcome, status: Status) -> tuple[RunnerUp, ...]:
    """Return the shapes that came next, each with the reason why a plan of this ``status`` does without it."""
    return tuple(
        RunnerUp(
            shape=("" if _role(costs, template) is Role.UNIFIED else f"{_role(costs, template)}: ")
            + describe(costs, template.stages),
            rate=template.rate,
            reason=_why_not(costs, outcome, template, status),
        )
        for template in outcome.runners_up
    )


def _role(costs: CostTables, template: Template) -> Role:
    return costs.mixes[template.mix].role


def _why_not(costs: CostTables, outcome: Outcome, template: Template, status: Status) -> str:
    objective, use, role = costs.problem.objective, use_of(costs, template), _role(costs, template)
    worth = float(outcome.rate_prices[costs.side_of(template.scope, template.mix)])  # value of a request/s there
    if objective.maximises:
        price = float(outcome.row_prices @ use)
        if price > worth * template.rate * (1.0 + 1e-6):
            half = "" if role is Role.UNIFIED else f", its {role} work {worth * template.rate:.4g}"
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


def simpler_or_best(simpler: Plan, best: Plan, within: float) -> Plan:
    """Return the simpler plan with a note on its loss, or the best if the simpler saves neither nodes nor shapes."""
    (nodes, shapes), (most, many) = _nodes_and_shapes(simpler), _nodes_and_shapes(best)
    if (nodes, shapes) >= (most, many):
        return replace(best, notes=(*best.notes, f"no plan within {within:.1%} of the best was found on fewer nodes"))
    loss = abs(simpler.result.value / best.result.value - 1.0)
    note = (
        f"the simplest plan found within {within:.1%} of the best: {_counted(nodes, 'node')} instead of {most} (a node "
        f"counts for each replica on it), {_counted(shapes, 'replica shape')} instead of {many}, for {loss:.2%} of "
        f"{best.result.value:.4g} {best.objective.unit}"
    )
    return replace(simpler, notes=(*simpler.notes, note))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _nodes_and_shapes(plan: Plan) -> tuple[int, int]:
    """Return the number of nodes, summed over replicas, and the number of distinct replica shapes."""
    nodes = sum(len({node_of(name) for name in replica.devices()}) for replica in plan.replicas)
    shapes = {
        (replica.role, *((s.gpu, s.tp, s.copies, s.num_layers) for s in replica.stages),
         *((p.stage, p.gpu, len(p.devices)) for p in replica.attention_workers))
        for replica in plan.replicas
    }  # fmt: skip
    return nodes, len(shapes)


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
