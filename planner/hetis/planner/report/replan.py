"""A re-planning on one screen: its value, what stays, what loads, and the steps in order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetis.formats.documents import to_data
from hetis.planner.report.comparison import goal_line
from hetis.planner.report.dispatch import plain_table
from hetis.planner.report.figures import digits, gigabytes, percent, plural, seconds
from hetis.planner.report.plan import section
from hetis.planner.report.plan_diff import (
    change_counts,
    change_document,
    changed_replicas,
    dropped_words,
    load_table,
    shape_of,
)
from hetis.planner.use_cases.json_values import json_value
from hetis.planner.use_cases.replan import Posed
from hetis.solver.plan import ObjectiveKind
from hetis.solver.replanning.change import ChangeCosts
from hetis.solver.replanning.solve import Replanning
from hetis.solver.replanning.transition import Action, Step

MAX_STEPS = 40  # steps listed; -o json has all


def render_replan(found: Replanning, posed: Posed, costs: ChangeCosts) -> RenderableType:
    """Return the table view, at most 80 columns wide if names allow it."""
    return Group(*_sections(found, posed, costs))


def _sections(found: Replanning, posed: Posed, costs: ChangeCosts) -> Iterator[RenderableType]:
    inputs = posed.loaded.inputs
    fleet = f"{inputs.cluster.name} ({plural(inputs.cluster.num_gpus(), 'GPU')})"
    yield Text.assemble(
        (inputs.model.name, "bold"), " on ", (fleet, "bold"), " for ", (inputs.workload.name, "bold")
    )  # fmt: skip
    yield goal_line(posed.problem.objective)
    yield _facts(found, posed, costs)
    yield section("Replicas", Text(change_counts(found.change)))
    yield from changed_replicas(found.change, posed.running, found.plan)
    if found.change.loads:
        yield section("Weights to load", load_table(found.change))
    yield section("KV dropped", Text(dropped_words(found.change)))
    yield section("Steps", _steps(found, posed))
    yield Text(lowest_words(found, posed))


def _unit(posed: Posed) -> str:
    kind = posed.problem.objective.kind
    return "requests/s" if kind is ObjectiveKind.THROUGHPUT else "requests/s of goodput"


def _facts(found: Replanning, posed: Posed, costs: ChangeCosts) -> Table:
    result, unit, transition = found.plan.result, found.plan.result.unit, found.transition
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    lost = f", {plural(len(found.lost), 'replica')} lost GPUs" if found.lost else ""
    table.add_row("Now", f"{digits(transition.before, 4)} {_unit(posed)}{lost}")
    table.add_row("Then", Text.assemble((f"{digits(result.value, 4)} {unit}", "bold green"), "  the plan itself"))
    net = f"{digits(found.value, 4)} {unit}  change counted, over {seconds_or_hours(costs.horizon_s)}"
    table.add_row("Net", net)
    proof = "proven best" if found.gap <= 1e-6 else f"proven: none is over {percent(found.gap)} better"
    table.add_row("Bound", f"{digits(found.bound, 4)} {unit}  gap {percent(found.gap)}, {proof}")
    if found.fresh_value is not None:
        table.add_row("From scratch", f"{digits(found.fresh_value, 4)} {unit}, had nothing run before")
    table.add_row("Costs", change_cost_words(costs))
    return table


def seconds_or_hours(value_s: float) -> str:
    """Return ``1 h``, ``90 min``, ``45 s``."""
    for size, unit in ((3600, "h"), (60, "min")):
        if value_s >= size and value_s % size == 0:
            return f"{value_s / size:,.0f} {unit}"
    return seconds(value_s)


def change_cost_words(costs: ChangeCosts) -> str:
    """Return the assumed costs of a change in words."""
    return (
        f"a start takes {seconds(costs.restart_s)} and the weights of its fullest GPU at "
        f"{digits(costs.load_bytes_per_s / 1e9)} GB/s; requests in flight lose half their service"
    )


def _steps(found: Replanning, posed: Posed) -> RenderableType:
    if not found.transition.steps:
        return Text("none: everything goes on as it is")
    table = plain_table(
        ("", "right"),
        ("", "left"),
        ("what", "left"),
        ("load", "right"),
        ("takes up to", "right"),
        ("capacity", "right"),
    )
    for number, row in enumerate(itertools.islice(step_rows(found, posed), MAX_STEPS), start=1):
        table.add_row(str(number), *row)
    if len(found.transition.steps) > MAX_STEPS:
        table.add_row("…", "", f"{len(found.transition.steps) - MAX_STEPS:,} more (-o json lists all)", "", "", "")
    return table


def step_rows(found: Replanning, posed: Posed) -> Iterator[list[str]]:
    """Return the cells of every step, in order."""
    return (_step_row(step, found, posed) for step in found.transition.steps)


def _step_row(step: Step, found: Replanning, posed: Posed) -> list[str]:
    starting = step.action is Action.START
    plan = found.plan if starting else posed.running
    names = [f"#{i} {shape_of(plan.replicas[i])}" for i in step.replicas]
    loads = sum(_load_of(found, i) for i in step.replicas) if starting else 0.0
    flow = f"{digits(step.capacity)} → {digits(step.capacity_after)}"
    return [
        step.action.value,
        "\n".join(names),
        gigabytes(loads) if loads else "-",
        seconds(step.seconds) if step.seconds else "-",
        flow,
    ]


def _load_of(found: Replanning, number: int) -> float:
    return next(change.load_bytes for change in found.change.replicas if change.after == number)


def lowest_words(found: Replanning, posed: Posed) -> str:
    """Return the lowest capacity on the way, and whether another order would keep more; empty without steps."""
    transition = found.transition
    if not transition.steps:
        return ""
    lowest = f" Lowest on the way: {digits(transition.lowest, 4)} {_unit(posed)}"
    if transition.best_lowest > transition.lowest * (1.0 + 1e-9):
        proof = f"no order keeps more than {digits(transition.best_lowest, 4)}"
    else:
        proof = "no order keeps more"
    return f"{lowest}; {proof}. All steps take {seconds(transition.seconds)} one after another."


def replan_document(found: Replanning, posed: Posed, costs: ChangeCosts) -> dict[str, Any]:
    """Return the answer as plain data, with the plan in full."""
    unit = found.plan.result.unit
    return {
        "apiVersion": "hetis/v1",
        "kind": "Replanning",
        "result": {"value": found.value, "bound": found.bound, "gap": found.gap, "unit": unit},
        "fresh_value": found.fresh_value,
        "change_costs": json_value(costs),
        "lost_replicas": list(found.lost),
        "replicas": [json_value(continued) for continued in found.continued],
        "change": change_document(found.change),
        "transition": json_value(found.transition),
        "plan": to_data(found.plan),
    }
