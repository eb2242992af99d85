"""Another fleet beside the present one, as blocks for terminals and pages, and as a document."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from hetis.formats.documents import to_data
from hetis.planner.report.blocks import Grid
from hetis.planner.report.changes import change_counts, change_fields
from hetis.planner.report.comparison import model_words
from hetis.planner.report.figures import digits, percent, plural
from hetis.planner.report.goals import goal_line, problem_title
from hetis.planner.report.tables import as_group, bullets, drawn, facts, section, titled
from hetis.planner.use_cases.comparing.plan_figures import Figures, figures_of
from hetis.planner.use_cases.grouping import gpu_counts, used_counts
from hetis.planner.use_cases.json_values import document, json_value
from hetis.planner.use_cases.other_fleets.additions import FleetChange
from hetis.planner.use_cases.other_fleets.what_if import Side, WhatIf
from hetis.solver.advice import ChangeVerdict, NodeShape
from hetis.solver.cluster import Link
from hetis.solver.plan import Plan

_NOTE = (
    "Every plan is solved from scratch; hetis-plan replan shows what to keep of a running plan, and what moving costs."
)


@as_group
def render_what_if(found: WhatIf) -> Iterator[RenderableType]:
    yield problem_title(found.before.loaded.inputs)
    yield goal_line(found.before.loaded.inputs.applicable_limits(found.objective))
    yield facts(change_lines(found.change, found.before))
    yield Text()
    yield drawn(sides := sides_grid(found))
    yield Padding(Text(sides.note, style="dim"), (0, 0, 0, 1))
    yield section("Difference of the best plans", Text(verdict_words(found)))
    for name, side in (("before", found.before), ("after", found.after)):
        if side.outcome.plan is None:
            yield section(f"No plan {name}: {side.outcome.status}", bullets(side.outcome.reasons[:3]))
    yield titled(use_grid(found))
    if found.plan_change is not None:
        yield section("Replicas", Text(change_counts(found.plan_change)))
        yield Padding(Text(_NOTE, style="dim"), (0, 0, 0, 1))


def change_lines(change: FleetChange, before: Side) -> Iterator[tuple[str, str]]:
    """Yield what is removed and what is added, each after a word that names it."""
    if change.remove:
        yield "without", ", ".join(change.remove)
    if change.add:
        yield "with", ", ".join(f"{addition.count} {addition.gpu.name}" for addition in change.add)
        yield "", shape_words(change.shape, before)


def shape_words(shape: NodeShape, before: Side) -> str:
    """Return a node's shape as ``in nodes of up to 8 GPUs, zone default, the network's 100 Gb/s``."""
    default = before.loaded.inputs.cluster.network.default
    nic = f"the network's {_speed(default)}" if shape.nic is None else f"a NIC of {_speed(shape.nic)}"
    inside = "" if shape.intra_link is None else f", {_speed(shape.intra_link)} between its GPUs"
    return f"in nodes of up to {plural(shape.gpus_per_node, 'GPU')}, zone {shape.zone}, {nic}{inside}"


def _speed(link: Link) -> str:
    return f"{digits(8e-9 * link.bytes_per_s)} Gb/s"


def sides_grid(found: WhatIf) -> Grid:
    """Return the figures of both fleets, a row each."""
    nothing = None if found.objective.maximises else math.inf  # the bound that proves that there is no plan

    def of_plan(cell: Callable[[Plan, Figures], str]) -> Callable[[Side], str]:
        def shown(side: Side) -> str:
            plan = side.outcome.plan
            return "-" if plan is None else cell(plan, figures_of(plan, side.loaded.inputs))

        return shown

    lines: list[tuple[str, Callable[[Side], str]]] = [
        ("GPUs", lambda side: f"{side.loaded.inputs.cluster.num_gpus():,}"),
        ("fleet USD/h", lambda side: _money(side.usd_per_hour)),
        (
            f"{found.objective.kind.value} {found.objective.unit}",
            of_plan(lambda plan, of: digits(plan.result.value, 4)),
        ),
        ("bound", lambda side: "-" if side.proven.bound == nothing else digits(side.proven.bound, 4)),
        ("gap", of_plan(lambda plan, of: percent(plan.result.gap))),
        ("GPUs in use", of_plan(lambda plan, of: f"{of.gpus_used:,}")),
        ("used USD/h", of_plan(lambda plan, of: _money(of.usd_per_hour))),
        ("replicas", of_plan(lambda plan, of: f"{len(plan.replicas):,}")),
        ("solved", lambda side: f"{side.outcome.solve_s:.1f} s"),
    ]
    return Grid(
        title="Before and after",
        columns=("'", "before", "after"),
        rows=[(name, cell(found.before), cell(found.after)) for name, cell in lines],
        note=model_words(found.objective),
        strong=2,  # the value
    )


def _money(usd: float | None) -> str:
    return "-" if usd is None else f"{usd:,.2f}"


def verdict_words(found: WhatIf) -> str:
    """Return in words what is proven; a difference smaller than the gaps is not claimed."""
    difference, unit = found.difference, found.objective.unit
    no_plan = _no_plan_words(found)
    if difference.no_plan_before and difference.no_plan_after:
        return f"proven: {no_plan}"
    span = ""
    if any(map(math.isfinite, (difference.low, difference.high))):
        span = f"between {_signed(difference.low)} and {_signed(difference.high)} {unit}"
    plans = no_plan or f"the plans found differ by {_signed(difference.found)} {unit}"
    match difference.verdict:
        case ChangeVerdict.SAME:
            return "proven: there is none"
        case ChangeVerdict.BETTER | ChangeVerdict.WORSE:
            return f"proven: {difference.verdict.value}, {'; '.join(filter(None, (span, plans)))}"
    if no_plan:
        return f"undecided: {f'{span}, because ' if span else ''}{no_plan}; a longer --time-limit may find a plan"
    advice = "" if difference.low == difference.high else "; a smaller --gap or a longer --time-limit narrows that"
    return f"undecided: {span}, because of the gaps ({plans}){advice}"


def _no_plan_words(found: WhatIf) -> str:
    """Return which sides are proven to have no plan, and on which none was found; empty if both have plans."""
    sides = (
        ("before", found.before.outcome.plan, found.difference.no_plan_before),
        ("after", found.after.outcome.plan, found.difference.no_plan_after),
    )
    proven = [name for name, _, no_plan in sides if no_plan]
    unknown = [name for name, plan, no_plan in sides if plan is None and not no_plan]
    known = (("no plan exists", proven), ("no plan was found", unknown))
    return ", and ".join(f"{what} {'either way' if names[1:] else names[0]}" for what, names in known if names)


def _signed(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "unknown"
    return f"{'+' if value > 0 else '-' if value < 0 else ''}{digits(abs(value))}"


def use_grid(found: WhatIf) -> Grid:
    """Return how many GPUs of every type exist and are used, before and after."""
    counts = [
        of
        for side in (found.before, found.after)
        for of in (gpu_counts(side.loaded.inputs.cluster), used_counts(side.outcome.plan))
    ]
    return Grid(
        title="GPUs in use",
        columns=("'GPU", "there", "used", "then there", "used"),
        rows=[(gpu, *(f"{of[gpu]:,}" for of in counts)) for gpu in dict.fromkeys([*counts[0], *counts[2]])],
    )


def what_if_document(found: WhatIf) -> dict[str, Any]:
    """Return the answer as plain data, including both plans in full."""
    return document(
        "WhatIf",
        objective=found.objective,
        removed=found.change.remove,
        added=[{"gpu": a.gpu.name, "count": a.count} for a in found.change.add],
        node_shape=found.change.shape,
        before=_side_fields(found.before) | _plan_field(found.before),
        after=_side_fields(found.after) | _plan_field(found.after),
        difference={**json_value(found.difference), "unit": found.objective.unit},
        plan_change=found.plan_change and change_fields(found.plan_change),
    )


def _side_fields(side: Side) -> dict[str, Any]:
    plan, inputs = side.outcome.plan, side.loaded.inputs
    return {
        "gpus": inputs.cluster.num_gpus(),
        "fleet_usd_per_hour": side.usd_per_hour,
        "status": side.outcome.status,
        "result": plan and plan.result,
        "figures": plan and figures_of(plan, inputs),
        "reasons": side.outcome.reasons,
    }


def _plan_field(side: Side) -> dict[str, Any]:
    return {"plan": side.outcome.plan and to_data(side.outcome.plan)}
