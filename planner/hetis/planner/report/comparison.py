"""Plans of several strategies or engines side by side, as tables and documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import RenderableType
from rich.text import Text

from hetis.formats.documents import to_data
from hetis.planner.report.alternatives import rung_grid
from hetis.planner.report.blocks import Cell, Column, Grid, grid_of
from hetis.planner.report.figures import digits, percent, seconds, tokens
from hetis.planner.report.goals import goal_line, problem_title
from hetis.planner.report.promises import kept_cell
from hetis.planner.report.tables import as_group, drawn, grid, section, titled
from hetis.planner.use_cases.comparing.compare import Compared, best_of
from hetis.planner.use_cases.comparing.plan_figures import Figures, figures_of, kept_of
from hetis.planner.use_cases.json_values import document, fields_of
from hetis.planner.use_cases.record.parts import Requested, Verified
from hetis.planner.use_cases.service_level import DEFAULT
from hetis.planner.use_cases.sources import Inputs
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.plan import Objective, ObjectiveKind, Plan
from hetis.solver.problem import PlacementProblem

PUBLISHED_MEANS = (
    "-paper: the search of a paper as published; its plan is evaluated by this cost model under these limits; "
    "bound and gap are those of the family to which its plans belong."
)
_LINES_PER_REASON = 3
_WIDEST_GAP = 9.99  # larger gaps are shown as above it


def simulated_means(plans: Iterable[Plan]) -> str:
    """Return what the column of kept rates means, with the service levels of plans that are not held to the default."""
    levels = {str(level): None for level in (Requested.of(plan).service_level for plan in plans) if level != DEFAULT}
    for_level = f", {'; or '.join(levels)}" if levels else ""
    return (
        f"kept: the highest rate tried, up to the plan's, at which simulated traffic kept the limits{for_level}; "
        "`place` puts this rate first. All other values are from the model."
    )


def model_words(objective: Objective) -> str:
    """Return whose values are shown for plans that were not simulated, since `place` shows simulated ones first."""
    words = "Values and bounds are the cost model's; these plans are not simulated."
    if objective.kind is not ObjectiveKind.GOODPUT:
        return words
    return f"{words} `place` shows the rate that simulated traffic keeps, which may be lower."


# --- the figures of plans


class PlanRow(NamedTuple):
    """A plan in a table of figures, or its lack (None), and the time that the search took."""

    name: str
    plan: Plan | None
    inputs: Inputs | PlacementProblem
    solve_s: float = 0.0


# Columns that a narrow console can do without, the least important one first.
_LEAST = ("KV\ntokens", "solved\ns", "USD/M\ntokens", "bound", "TPOT\nms", "TTFT\ns")


def figures_grid(
    rows: Sequence[PlanRow], objective: Objective, name: str, best: int | None, *, limits: bool = False,
    on_page: bool = False,
) -> Grid:  # fmt: skip
    """Return the figures of plans for an objective, below a header for their names.

    ``best`` is the position of the best one. ``limits`` adds those of the latencies, ``on_page`` the output tokens/s,
    but not how long the searches took.
    """
    plans = [row.plan for row in rows if row.plan is not None]
    rate = "through-" if objective.kind is ObjectiveKind.THROUGHPUT else "good-"
    has_units = len({plan.objective.unit for plan in plans}) > 1
    bound = "bound" if objective.maximises or has_units else f"bound\n{objective.unit}"
    are_simulated = any(kept_of(plan) is not None for plan in plans)

    def column(head: str, cell: Callable[[Plan, Figures], Cell]) -> Column[tuple[PlanRow, Figures | None]]:
        def shown(of: tuple[PlanRow, Figures | None]) -> Cell:
            (row, figures) = of
            return Text("-", "dim") if row.plan is None or figures is None else cell(row.plan, figures)

        return head, shown

    def or_dash(value: float | None) -> str:
        return "-" if value is None else digits(value)

    def limit(limit_s: float | None) -> str:
        return "none" if limit_s is None else seconds(limit_s)

    def took(row: PlanRow) -> Text:
        return Text(f"{row.solve_s:,.{1 if row.solve_s < 99.95 else 0}f}", "dim" if row.plan is None else "")

    return grid_of(
        [(row, None if row.plan is None else figures_of(row.plan, row.inputs)) for row in rows],
        (f"'{name}", lambda one: Text(one[0].name, "dim" if one[0].plan is None else "")),
        column(f"{rate}\nput /s", lambda plan, of: digits(of.rate_rps)),
        column("kept\n/s", lambda plan, of: kept_cell(plan, unknown="-")) if are_simulated else None,
        column("output\ntokens/s", lambda plan, of: digits(of.output_tokens_per_s)) if on_page else None,
        column(bound, lambda plan, of: digits(plan.result.bound) + (f" {plan.objective.unit}" if has_units else "")),
        column("gap", lambda plan, of: _gap(plan)),
        column("USD\n/h", lambda plan, of: or_dash(of.usd_per_hour)),
        column("USD/M\ntokens", lambda plan, of: or_dash(of.usd_per_million_output_tokens)),
        column("TTFT\ns", lambda plan, of: digits(of.ttft_s)),
        column("TTFT\nlimit", lambda plan, of: limit(plan.objective.ttft_limit_s)) if limits else None,
        column("TPOT\nms", lambda plan, of: digits(1e3 * of.tpot_s)),
        column("TPOT\nlimit", lambda plan, of: limit(plan.objective.tpot_limit_s)) if limits else None,
        column("KV\ntokens", lambda plan, of: tokens(of.kv_tokens)),
        column("GPUs\n(idle)", lambda plan, of: f"{of.gpus_used:,} ({of.gpus_idle:,})"),
        None if on_page else ("solved\ns", lambda one: took(one[0])),
        title="In figures",
        note=simulated_means(plans) if are_simulated else "",
        strong=best,
        least=[bound if head == "bound" else head for head in _LEAST],
        tight=True,
    )


def _gap(plan: Plan) -> str:
    gap = percent(plan.result.gap) if plan.result.gap <= _WIDEST_GAP else f">{percent(_WIDEST_GAP)}"
    return f"{gap} with the fleet to itself" if plan.other_tenants() else gap


# --- strategies or engines


@as_group
def render_comparison(compared: Sequence[Compared], inputs: Inputs, objective: Objective) -> Iterator[RenderableType]:
    yield problem_title(inputs)
    yield goal_line(inputs.applicable_limits(objective))
    if words := engine_words(compared):
        yield Text(words, style="dim")
    yield Text()
    label = _labels(compared)
    with_plan = {number: one.plan for number, one in enumerate(compared) if one.plan is not None}
    plans = list(with_plan.values())
    best = list(with_plan)[best_of(plans)] if plans else None
    rows = [PlanRow(label(one), one.plan, inputs, one.solve_s) for one in compared]
    figures = figures_grid(rows, objective, "engine" if _compares_engines(compared) else "strategy", best)
    yield drawn(figures)
    if figures.note:
        yield Text(f"\n{figures.note} Red: less than the plan's; none: no rate tried.", style="dim")
    elif plans and not any(Verified.of(plan).verification for plan in plans):
        yield Text(f"\n{model_words(objective)}", style="dim")
    if published := dict.fromkeys(one.strategy for one in compared if STRATEGIES[one.strategy].is_published):
        yield Text(f"\n{PUBLISHED_MEANS}", style="dim")
        yield grid(
            False, True, rows=((Text(f" {name}", "dim"), Text(STRATEGIES[name].summary, "dim")) for name in published)
        )
    for one in compared:
        if one.is_default and one.plan is not None and (rungs := rung_grid(one.plan)) is not None:
            yield titled(rungs)
    for title, style, outcomes in (
        ("Without a plan", "bold", [one for one in compared if one.plan is None]),
        (FAILED, "bold red", [one for one in compared if one.plan is not None and one.reasons]),
    ):
        if outcomes:
            yield section(title, grid(False, True, rows=((label(one), _why(one)) for one in outcomes)), style=style)


FAILED = "Simulation or another search failed"


def engine_words(compared: Iterable[Compared]) -> str:
    """Return which engine all plans are for; empty if each row names its own."""
    engines = _engines(compared)
    return f"for engine {engines.pop()}" if len(engines) == 1 else ""


def _why(outcome: Compared) -> str:
    lines = "\n".join(outcome.reasons[:_LINES_PER_REASON])
    return f"{outcome.status}: {lines}"


def _compares_engines(compared: Sequence[Compared]) -> bool:
    """Return whether several engines are compared with a single strategy."""
    return len({outcome.strategy for outcome in compared}) == 1 < len(_engines(compared))


def _engines(compared: Iterable[Compared]) -> set[str]:
    return {outcome.engine for outcome in compared if outcome.engine is not None}


def _labels(compared: Sequence[Compared]) -> Callable[[Compared], str]:
    """Return a function that labels a row: by strategy, by engine, or by both if there are several of both.

    The plan that `place` shows has its rung beside its name.
    """
    compares_engines, several = _compares_engines(compared), len(_engines(compared)) > 1

    def label(one: Compared) -> str:
        if one.is_default:
            return one.name if one.plan is None else f"{one.name} ({Requested.of(one.plan).rung})"
        return (one.engine or "") if compares_engines else one.name if several else one.strategy

    return label


def comparison_document(compared: Sequence[Compared], inputs: Inputs, objective: Objective) -> dict[str, Any]:
    return document("Comparison", objective=objective, strategies=[_entry(outcome, inputs) for outcome in compared])


def _entry(outcome: Compared, inputs: Inputs) -> dict[str, Any]:
    plan = outcome.plan
    return {
        **fields_of(outcome, "name", "strategy", "engine", "status"),
        "rung": plan and Requested.of(plan).rung,
        "result": plan and plan.result,
        "figures": plan and figures_of(plan, inputs),
        "simulated": plan and Verified.of(plan).verification,
        **fields_of(outcome, "solve_s", "reasons"),
        "plan": plan and to_data(plan),
    }
