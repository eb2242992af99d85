"""The pages of the commands: one or several plans, another fleet, what to buy next, the transition to a new plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from types import MappingProxyType

from hetis.planner.report import comparison
from hetis.planner.report.changes import MAX_STEPS, change_cost_words, change_counts, lowest_words, step_rows
from hetis.planner.report.differences import LIMITS, difference_words, differences, is_one_question
from hetis.planner.report.figures import digits, percent, plural, seconds, tokens, with_unit
from hetis.planner.report.goals import problem_line, problem_title
from hetis.planner.report.page.blocks import (
    Block,
    Grid,
    Page,
    Scale,
    ScaleRow,
    Section,
    Sentences,
    Tile,
    Tiles,
    render_page,
)
from hetis.planner.report.page.plan_section import plan_blocks
from hetis.planner.report.promises import kept_cell
from hetis.planner.report.simulation.pictures import Panel, panels_of, panels_of_sweep
from hetis.planner.report.simulation.text import service_level_words
from hetis.planner.report.tables import SimulationRemarks
from hetis.planner.use_cases.compare import Compared, best_of, figures_of, kept_of
from hetis.planner.use_cases.other_fleets.replan import PosedReplan
from hetis.planner.use_cases.other_fleets.what_if import BuyNext, Side, WhatIf
from hetis.planner.use_cases.record.parts import Requested, Verified
from hetis.planner.use_cases.simulation.simulate import Simulated
from hetis.planner.use_cases.sources import Inputs
from hetis.planner.use_cases.verification.latency_curve import Curve
from hetis.solver.plan import Objective, Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.replanning.change import ChangeCosts
from hetis.solver.replanning.replanner import Replanning

ROOM = 1.02  # ratio of an axis to its longest bar


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPlan:
    """A plan on a page: its name and, if requested, its latencies by rate and the gains from more GPUs."""

    name: str
    plan: Plan
    problem: PlacementProblem
    curve: Curve | None = None
    market: BuyNext | None = None


def plans_page(shown: Sequence[ShownPlan]) -> str:
    """Return the page of one plan, or of several plans after their comparison."""
    sections = list[Section]()
    for number, one in enumerate(shown, start=1):
        sections.append(_section(one, number))
        if one.market is not None:
            heading = "What to buy next" + (f": {one.name}" if len(shown) > 1 else "")
            sections.append(_market_section(one.market, anchor=f"market-{number}", heading=heading, known=one.plan))
    first, title = shown[0], _title(shown[0].problem)
    if len(shown) > 1:
        rows = [(one.name, one.plan, one.problem) for one in shown]
        differing = differences([(one.name, one.problem) for one in shown])
        blocks = tuple(side_by_side(rows, first.plan.objective, differing))
        lead = difference_words(differing) or problem_line(first.problem, first.plan.objective)
        sections.insert(0, Section(anchor="beside", heading="Side by side", lead=lead, blocks=blocks))
        if differing.keys() & {"model", "fleet"}:
            title = f"{plural(len(shown), 'plan')} side by side"
    return _page(title, sections)


def comparison_page(compared: Sequence[Compared], inputs: Inputs, objective: Objective) -> str:
    """Return the page of several strategies side by side, followed by the best plan in full."""
    with_plan = [(one.name, one.plan) for one in compared if one.plan is not None]
    without = tuple((one.name, f"{one.status}: {'; '.join(one.reasons)}") for one in compared if one.plan is None)
    blocks = list(side_by_side([(name, plan, inputs) for name, plan in with_plan], objective))
    if without:
        blocks.append(Sentences(title="Without a plan", terms=without))
    if failed := tuple((one.name, "; ".join(one.reasons)) for one in compared if one.plan is not None and one.reasons):
        blocks.append(Sentences(title="Simulation or another search failed", terms=failed))
    words = comparison.engine_words(compared)
    lead = problem_line(inputs, objective) + (f"; {words}" if words else "")
    sections = [Section(anchor="beside", heading="Strategies side by side", lead=lead, blocks=tuple(blocks))]
    if with_plan:
        name, best = with_plan[best_of([plan for _, plan in with_plan])]
        problem = inputs.problem(best.objective, best.strategy, engine=Requested.of(best).engine)
        sections.append(_section(ShownPlan(name=f"The best: {name}", plan=best, problem=problem), 1))
    return _page(f"{inputs.model.name} on {inputs.cluster.name}", sections)


def what_if_page(found: WhatIf) -> str:
    """Return the page of two fleets: their figures, what is proven about the difference, and both plans."""
    inputs = found.before.loaded.inputs
    change = tuple(" ".join(line) for line in comparison.change_lines(found.change, found.before))
    blocks: list[Block] = [
        Sentences(title="The change", lines=change),
        Grid(
            title="Before and after", columns=("'", "before", "after"), rows=tuple(comparison.side_rows(found)),
            note=comparison.model_words(found.objective),
        ),
        Sentences(title="Difference of the best plans", lines=(comparison.verdict_words(found),)),
    ]  # fmt: skip
    if found.plan_change is not None:
        blocks.append(Sentences(title="Replicas", lines=(change_counts(found.plan_change),)))
    lead = problem_line(inputs, found.objective)
    sections = [Section(anchor="change", heading="Another fleet", lead=lead, blocks=tuple(blocks))]
    for number, (name, side) in enumerate((("After", found.after), ("Before", found.before)), start=1):
        sections += _side(name, side, number)
    return _page(f"What if: {inputs.model.name} on {inputs.cluster.name}", sections)


def buy_next_page(found: BuyNext) -> str:
    """Return the page of the market, the best purchase first, followed by the present plan."""
    inputs = found.before.loaded.inputs
    sections = [_market_section(found, anchor="market", heading="What to buy next")]
    sections += _side("The fleet as it is", found.before, 1, found)
    return _page(f"What to buy next: {inputs.model.name} on {inputs.cluster.name}", sections)


def replan_page(found: Replanning, posed: PosedReplan, costs: ChangeCosts) -> str:
    """Return the page of a change: its value and its steps, followed by the new plan."""
    result, transition, unit = found.plan.result, found.transition, found.plan.result.unit
    lost = f"{plural(len(found.lost), 'replica')} lost GPUs" if found.lost else "of goodput"
    tiles = (
        Tile(label="Now", value=digits(transition.before), unit="requests/s", note=lost),
        Tile(label="Then", value=digits(result.value), unit=unit, note="the new plan itself", tone="good"),
        Tile(label="Net", value=digits(found.value), unit=unit, note="with the cost of the change counted"),
        Tile(label="Proof", value=percent(found.gap), unit="gap", note=f"bound {with_unit(found.bound, unit)}"),
    )
    steps = Grid(
        title="Steps, in this order",
        intro=change_cost_words(costs),
        columns=("", "'action", "'what", "load", "takes up to", "capacity"),
        rows=tuple((str(i), *row) for i, row in enumerate(islice(step_rows(found, posed), MAX_STEPS), start=1)),
        note=lowest_words(found, posed),
    )
    blocks = (Tiles(tiles=tiles), steps, Sentences(title="Replicas", lines=(change_counts(found.change),)))
    lead = problem_line(posed.loaded.inputs, posed.problem.objective)
    sections = [Section(anchor="change", heading="From the running plan to the next", lead=lead, blocks=blocks)]
    sections.append(_section(ShownPlan(name="The new plan", plan=found.plan, problem=posed.problem), 1))
    return _page(f"Re-planned: {_title(posed.problem)}", sections)


def simulation_page(simulated: Simulated, plan: Plan, problem: PlacementProblem) -> str:
    """Return the page of a plan with the results of its simulation."""
    load = simulated.question.load
    requests = f"{simulated.question.num_requests:,} requests a run"
    words = service_level_words(simulated)
    level = "" if words is None else f" Service level {words.plain}."
    traffic = f"{load.lengths.name}, arrivals {load.arrivals.value}, {requests}.{level}"
    shown = ShownPlan(name="The plan under traffic", plan=plan, problem=problem)
    return _page(f"Simulated: {_title(problem)}", [_plan_section(shown, 1, panels_of(simulated, plan), traffic)])


# --- parts of these pages


def _section(shown: ShownPlan, number: int) -> Section:
    panels: tuple[Panel, ...] = ()
    traffic = ""
    if shown.curve is not None:
        panels = tuple(panels_of_sweep(shown.curve.sweep, shown.curve.limits))
        kept = shown.curve.sweep.goodput_rps
        until = (
            f"Among these rates, the limits are kept up to {digits(kept)} requests/s."
            if kept
            else "No rate keeps the limits."
        )
        traffic = (
            f"Poisson arrivals of {shown.problem.workload.name}, {shown.curve.num_requests:,} requests at every rate; "
            f"bands are 95% intervals. {until}{_remarks(shown.plan, shown.curve)}"
        )
    return _plan_section(shown, number, panels, traffic)


def _plan_section(shown: ShownPlan, number: int, panels: Sequence[Panel], traffic: str) -> Section:
    blocks = plan_blocks(shown.plan, shown.problem, panels, traffic, has_market=shown.market is not None)
    lead = problem_title(shown.problem).plain
    return Section(anchor=f"plan-{number}", heading=shown.name, lead=lead, blocks=tuple(blocks))


def _remarks(plan: Plan, curve: Curve) -> str:
    verification = Verified.of(plan).verification  # the curve is simulated as it was
    dispatched = verification is not None and bool(verification.dispatched)
    remarks = SimulationRemarks(curve.share, curve.too_short, dispatched)
    return "".join(f" {line.capitalize()}." for line in remarks.lines())


def _side(name: str, side: Side, number: int, market: BuyNext | None = None) -> list[Section]:
    plan = side.outcome.plan
    if plan is None:
        lines = side.outcome.reasons or (side.outcome.status,)
        blocks = (Sentences(title=f"No plan: {side.outcome.status}", lines=lines),)
        return [Section(anchor=f"plan-{number}", heading=name, lead="", blocks=blocks)]
    problem = side.loaded.inputs.problem(plan.objective, plan.strategy, engine=Requested.of(plan).engine)
    return [_section(ShownPlan(name=name, plan=plan, problem=problem, market=market), number)]


def _market_section(found: BuyNext, *, anchor: str, heading: str, known: Plan | None = None) -> Section:
    """Return the best purchase in words, and the whole market; ``known`` is the plan that is on the same page."""
    blocks: list[Block] = list(_purchase(found))
    blocks.append(
        Grid(
            title="The market, best purchase per dollar first",
            intro=f"{plural(found.count, 'GPU')} of one type added, and everything solved again.",
            columns=("'GPU", *(heading.replace("\n", " ") for heading in comparison.offer_headings(found)[1:-1]), "'"),
            rows=tuple(tuple(comparison.offer_row(offer)) for offer in found.offers),
            note="Gain: between the plans found, for all added GPUs. Proven: the range that both bounds allow. "
            + comparison.model_words(found.objective, known),
        )
    )  # fmt: skip
    if found.left_out:
        blocks.append(Sentences(title="Not solved in time", lines=found.left_out))
    lead = problem_line(found.before.loaded.inputs, found.objective)
    return Section(anchor=anchor, heading=heading, lead=lead, blocks=tuple(blocks))


def _purchase(found: BuyNext) -> Iterator[Block]:
    if not found.offers:
        return
    best = found.offers[0]
    gain = best.gain if found.objective.maximises else -best.gain
    if gain > 0:
        price = "" if best.usd_per_hour is None else f" at {digits(best.usd_per_hour)} USD/h each"
        text = f"Buy {best.addition.count} × {best.addition.gpu.name}{price}."
    else:
        text = "No GPU type on the market improves the plan."
    yield Sentences(title="In one sentence", lines=(text,))


def _title(problem: PlacementProblem) -> str:
    return f"{problem.model.name} on {problem.cluster.name}"


def _page(title: str, sections: Sequence[Section]) -> str:
    footer = f"Made by hetis {metadata.version('hetis')}. Values and bounds are those of its cost model; "
    footer += "results under traffic are shown where it was simulated."
    return render_page(Page(title=title, sections=tuple(sections), footer=footer))


# --- several plans on one scale and in one table


def side_by_side(
    rows: Sequence[tuple[str, Plan, Inputs | PlacementProblem]],
    objective: Objective,
    differing: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Block]:
    """Yield the plans on one scale and in one table, with the best one in bold, and in what their problems differ.

    ``differing`` is made by `hetis.planner.report.differences`. Plans that answer different questions have no best
    one, and those with different objectives no scale.
    """
    if not rows:
        return
    best = best_of([plan for _, plan, _ in rows]) if is_one_question(differing) else None
    if len({plan.objective.kind for _, plan, _ in rows}) == 1:
        yield _scale([(name, plan) for name, plan, _ in rows], objective, best)
    are_simulated = any(kept_of(plan) is not None for _, plan, _ in rows)
    limit = ["limit"] if LIMITS in differing else []
    columns = ["'", "requests/s", "kept", "output tokens/s", "bound", "gap", "USD/h", "USD per M tokens"]
    columns += ["TTFT p95", *limit, "TPOT mean", *limit, "KV tokens", "GPUs", "idle"]
    has_units = len({plan.objective.unit for _, plan, _ in rows}) > 1
    yield Grid(
        title="In figures",
        columns=tuple(columns),
        rows=tuple(
            (name, *_figures_row(plan, inputs, has_limits=bool(limit), has_unit=has_units))
            for name, plan, inputs in rows
        ),
        strong=best,
        note=comparison.simulated_means(plan for _, plan, _ in rows) if are_simulated else "",
    )
    if differing:
        terms = tuple((f"{subject[0].upper()}{subject[1:]}", words) for subject, words in differing.items())
        yield Sentences(title="What differs", terms=terms)


def _scale(plans: Sequence[tuple[str, Plan]], objective: Objective, best: int | None) -> Scale:
    known = [plan.result.value for _, plan in plans]
    known += [plan.result.bound for _, plan in plans if math.isfinite(plan.result.bound)]
    axis = max(known) * ROOM or 1.0
    return Scale(
        title=f"{objective.kind.value.capitalize()} by the model, {objective.unit}",
        rows=tuple(
            ScaleRow(
                label=name,
                text=digits(plan.result.value, 4),
                share=plan.result.value / axis,
                mark=plan.result.bound / axis if math.isfinite(plan.result.bound) else None,
                strong=number == best,
            )
            for number, (name, plan) in enumerate(plans)
        ),
        note="The line is what no plan of the family can exceed." if objective.maximises else
        "The line is what no plan of the family can go below.",
    )  # fmt: skip


def _figures_row(plan: Plan, inputs: Inputs | PlacementProblem, *, has_limits: bool, has_unit: bool) -> tuple[str, ...]:
    figures, result, objective = figures_of(plan, inputs), plan.result, plan.objective
    dollars, per_million = figures.usd_per_hour, figures.usd_per_million_output_tokens
    limits_s = (objective.ttft_limit_s, objective.tpot_limit_s)
    ttft, tpot = ([("none" if it is None else seconds(it))] if has_limits else [] for it in limits_s)
    return (
        digits(figures.rate_rps),
        kept_cell(plan, unknown="–").plain,
        digits(figures.output_tokens_per_s),
        f"{digits(result.bound)}{f' {objective.unit}' if has_unit else ''}",
        f"{percent(result.gap)}{' with the fleet to itself' if plan.other_tenants() else ''}",
        "–" if dollars is None else digits(dollars),
        "–" if per_million is None else digits(per_million),
        seconds(figures.ttft_s) if plan.replicas else "–",
        *ttft,
        seconds(figures.tpot_s) if plan.replicas else "–",
        *tpot,
        tokens(figures.kv_tokens),
        f"{figures.gpus_used:,}",
        f"{figures.gpus_idle:,}",
    )
