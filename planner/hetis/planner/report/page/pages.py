"""The pages of the commands: one or several plans, the transition to a new plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from types import MappingProxyType

from hetis.planner.report.blocks import Bar, Block, Page, Scale, Section, Sentences, Tile, Tiles
from hetis.planner.report.changes import change_cost_words, change_counts, steps_grid
from hetis.planner.report.comparison import PlanRow, figures_grid
from hetis.planner.report.figures import digits, percent, plural, with_unit
from hetis.planner.report.goals import (
    LIMITS,
    difference_words,
    differences,
    is_one_question,
    problem_line,
    problem_title,
)
from hetis.planner.report.page.plan_section import plan_blocks
from hetis.planner.report.page.rendering import render_page
from hetis.planner.report.simulation.pictures import Panel, panels_of_sweep
from hetis.planner.report.tables import SimulationRemarks
from hetis.planner.use_cases.comparing.compare import best_of
from hetis.planner.use_cases.other_fleets.replan import PosedReplan
from hetis.planner.use_cases.record.parts import Verified
from hetis.planner.use_cases.sources import Inputs
from hetis.planner.use_cases.verification.latency_curve import Curve
from hetis.solver.plan import Objective, Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.replanning.change import ChangeCosts
from hetis.solver.replanning.replanner import Replanning

ROOM = 1.02  # ratio of an axis to its longest bar


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPlan:
    """A plan on a page: its name and, if requested, its latencies by rate."""

    name: str
    plan: Plan
    problem: PlacementProblem
    curve: Curve | None = None


def plans_page(shown: Sequence[ShownPlan]) -> str:
    """Return the page of one plan, or of several plans after their comparison."""
    sections = [_section(one, number) for number, one in enumerate(shown, start=1)]
    first, title = shown[0], _title(shown[0].problem)
    if len(shown) > 1:
        rows = [PlanRow(one.name, one.plan, one.problem) for one in shown]
        differing = differences([(one.name, one.problem) for one in shown])
        blocks = list(side_by_side(rows, first.plan.objective, differing))
        lead = difference_words(differing) or problem_line(first.problem, first.plan.objective)
        sections.insert(0, Section("beside", "Side by side", lead, blocks))
        if differing.keys() & {"model", "fleet"}:
            title = f"{plural(len(shown), 'plan')} side by side"
    return _page(title, sections)


def replan_page(found: Replanning, posed: PosedReplan, costs: ChangeCosts) -> str:
    """Return the page of a change: its value and its steps, followed by the new plan."""
    result, unit = found.plan.result, found.plan.result.unit
    lost = f"{plural(len(found.lost), 'replica')} lost GPUs" if found.lost else "of goodput"
    tiles = (
        Tile("Now", digits(found.transition.before), "requests/s", lost),
        Tile("Then", digits(result.value), unit, "the new plan itself", tone="good"),
        Tile("Net", digits(found.value), unit, "with the cost of the change counted"),
        Tile("Proof", percent(found.gap), "gap", f"bound {with_unit(found.bound, unit)}"),
    )
    blocks = [
        Tiles(tiles=tiles),
        replace(steps_grid(found, posed), intro=change_cost_words(costs)),
        Sentences(title="Replicas", lines=[change_counts(found.change)]),
    ]
    lead = problem_line(posed.loaded.inputs, posed.problem.objective)
    sections = [
        Section("change", "From the running plan to the next", lead, blocks),
        _section(ShownPlan(name="The new plan", plan=found.plan, problem=posed.problem), 1),
    ]
    return _page(f"Re-planned: {_title(posed.problem)}", sections)


# --- parts of these pages


def _section(shown: ShownPlan, number: int) -> Section:
    if shown.curve is None:
        return _plan_section(shown, number, (), "")
    kept, verification = shown.curve.sweep.goodput_rps, Verified.of(shown.plan).verification
    until = f"Among these rates, the limits are kept up to {digits(kept)} requests/s."
    # The curve is simulated as the plan was.
    remarks = SimulationRemarks(shown.curve.share, shown.curve.too_short, False)
    if verification is not None:
        of_plan = SimulationRemarks.of(verification)
        remarks = of_plan._replace(share=remarks.share, too_short=remarks.too_short)
    traffic = (
        f"Poisson arrivals of {shown.problem.workload.name}, {shown.curve.num_requests:,} requests at every rate; "
        f"bands are 95% intervals. {until if kept else 'No rate keeps the limits.'}"
        + "".join(f" {line.capitalize()}." for line in remarks.lines())
    )
    panels = tuple(panels_of_sweep(shown.curve.sweep, shown.curve.limits))
    return _plan_section(shown, number, panels, traffic)


def _plan_section(shown: ShownPlan, number: int, panels: Sequence[Panel], traffic: str) -> Section:
    blocks = plan_blocks(shown.plan, shown.problem, panels, traffic)
    return Section(f"plan-{number}", shown.name, problem_title(shown.problem).plain, list(blocks))


def _title(problem: Inputs | PlacementProblem) -> str:
    return f"{problem.model.name} on {problem.cluster.name}"


def _page(title: str, sections: Sequence[Section]) -> str:
    footer = f"Made by hetis {metadata.version('hetis')}. Values and bounds are those of its cost model; "
    footer += "results under traffic are shown where it was simulated."
    return render_page(Page(title=title, sections=sections, footer=footer))


# --- several plans on one scale and in one table


def side_by_side(
    rows: Sequence[PlanRow], objective: Objective, differing: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Block]:
    """Yield the plans on one scale and in one table, with the best one in bold, and in what their problems differ.

    ``differing`` is made by `hetis.planner.report.goals`. Plans that answer different questions have no best
    one, and those with different objectives no scale.
    """
    plans = [(row.name, row.plan) for row in rows if row.plan is not None]
    if not plans:
        return
    best = best_of([plan for _, plan in plans]) if is_one_question(differing) else None
    if len({plan.objective.kind for _, plan in plans}) == 1:
        yield _scale(plans, objective, best)
    yield figures_grid(rows, objective, "", best, limits=LIMITS in differing, on_page=True)
    if differing:
        terms = [(f"{subject[0].upper()}{subject[1:]}", words) for subject, words in differing.items()]
        yield Sentences(title="What differs", terms=terms)


def _scale(plans: Sequence[tuple[str, Plan]], objective: Objective, best: int | None) -> Scale:
    results = [plan.result for _, plan in plans]
    known = [value for one in results for value in (one.value, one.bound) if math.isfinite(value)]
    axis = max(known) * ROOM or 1.0
    return Scale(
        title=f"{objective.kind.value.capitalize()} by the model, {objective.unit}",
        rows=[
            Bar(
                name,
                digits(plan.result.value, 4),
                plan.result.value / axis,
                mark=plan.result.bound / axis if math.isfinite(plan.result.bound) else None,
                strong=number == best,
            )
            for number, (name, plan) in enumerate(plans)
        ],
        note=f"The line is what no plan of the family can {'exceed' if objective.maximises else 'go below'}.",
    )
