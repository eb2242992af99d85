"""Strategies, or engines, side by side: a table with a row for each, and why some have no plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetis.formats.documents import to_data
from hetis.planner.report.figures import digits, percent, plural, tokens
from hetis.planner.use_cases.compare import Compared, Figures, figures_of
from hetis.planner.use_cases.json_values import json_value
from hetis.planner.use_cases.sources import Inputs
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.plan import Objective, ObjectiveKind, Plan

PUBLISHED_MEANS = (
    "-paper: the search of a paper as published, its plan priced by this cost model and held to these limits; bound "
    "and gap are those of the family that its plans are of."
)
_LINES_PER_REASON = 3
_WIDEST_GAP = 9.99  # larger gaps are shown as above it


def render_comparison(compared: Sequence[Compared], inputs: Inputs, objective: Objective) -> RenderableType:
    """Return the table view, at most 80 columns wide if the names allow it."""
    parts: list[RenderableType] = [_title(inputs), goal_line(objective), Text(), _table(compared, inputs, objective)]
    published = dict.fromkeys(o.strategy for o in compared if STRATEGIES[o.strategy].is_published)
    if published:
        parts += [Text(f"\n{PUBLISHED_MEANS}", style="dim"), _published(published)]
    without = [outcome for outcome in compared if outcome.plan is None]
    if without:
        parts += [Text("\nWithout a plan", style="bold"), _reasons(without, _labels(compared))]
    return Group(*parts)


def _published(strategies: Iterable[str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for name in strategies:
        table.add_row(f" {name}", STRATEGIES[name].summary, style="dim")
    return table


def comparison_document(compared: Sequence[Compared], inputs: Inputs, objective: Objective) -> dict[str, Any]:
    """Return the comparison as plain data, with every plan in full."""
    return {
        "apiVersion": "hetis/v1",
        "kind": "Comparison",
        "objective": json_value(objective),
        "strategies": [_entry(outcome, inputs) for outcome in compared],
    }


def _entry(outcome: Compared, inputs: Inputs) -> dict[str, Any]:
    plan = outcome.plan
    return {
        "strategy": outcome.strategy,
        "engine": outcome.engine,
        "status": outcome.status,
        "result": json_value(plan.result) if plan is not None else None,
        "figures": json_value(figures_of(plan, inputs)) if plan is not None else None,
        "solve_s": outcome.solve_s,
        "reasons": list(outcome.reasons),
        "plan": to_data(plan) if plan is not None else None,
    }


def _title(inputs: Inputs) -> Text:
    fleet = f"{inputs.cluster.name} ({plural(inputs.cluster.num_gpus(), 'GPU')})"
    return Text.assemble(
        (inputs.model.name, "bold"), " on ", (fleet, "bold"), " for ", (inputs.workload.name, "bold")
    )  # fmt: skip


def goal_line(objective: Objective) -> Text:
    """Return the objective and its limits in a line."""
    ttft, tpot = objective.ttft_limit_s, objective.tpot_limit_s
    limits = [
        f"TTFT p95 {'unlimited' if ttft is None else f'up to {ttft:g} s'}",
        f"TPOT {'unlimited' if tpot is None else f'up to {1e3 * tpot:g} ms'}",
    ]
    demand = "" if objective.demand_rps is None else f" for {digits(objective.demand_rps)} requests/s"
    return Text(f"{objective.kind.value}{demand}; {', '.join(limits)}", style="dim")


def _table(compared: Sequence[Compared], inputs: Inputs, objective: Objective) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    label = _labels(compared)
    table.add_column("engine" if _compares_engines(compared) else "strategy", no_wrap=True, vertical="bottom")
    rate = "through-\nput" if objective.kind is ObjectiveKind.THROUGHPUT else "good-\nput"
    headings = [f"{rate} /s", "bound", "gap", "USD\n/h", "USD/M\ntokens", "TTFT\ns", "TPOT\nms", "KV\ntokens"]
    if not objective.maximises:
        headings[1] = f"bound\n{objective.unit}"
    for heading in (*headings, "GPUs\n(idle)", "solved\ns"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = _best(compared, objective)
    for outcome in compared:
        if outcome.plan is None:
            table.add_row(label(outcome), *["-"] * 9, _solve_time(outcome.solve_s), style="dim")
        else:
            row = _row(outcome.plan, figures_of(outcome.plan, inputs), outcome.solve_s)
            table.add_row(label(outcome), *row, style="bold" if outcome is best else "")
    return table


def _compares_engines(compared: Sequence[Compared]) -> bool:
    """Return whether there are several engines and one strategy."""
    return len({outcome.strategy for outcome in compared}) == 1 < len({outcome.engine for outcome in compared})


def _labels(compared: Sequence[Compared]) -> Callable[[Compared], str]:
    """Return a function for a row's label: a strategy, an engine, or both if there are several of both."""
    if _compares_engines(compared):
        return lambda outcome: outcome.engine or ""
    several = len({outcome.engine for outcome in compared}) > 1
    return lambda outcome: outcome.name if several else outcome.strategy


def _best(compared: Sequence[Compared], objective: Objective) -> Compared | None:
    found = [(outcome.plan.result.value, outcome) for outcome in compared if outcome.plan is not None]
    if not found:
        return None
    pick = max if objective.maximises else min
    return pick(found, key=lambda pair: pair[0])[1]


def _row(plan: Plan, figures: Figures, solve_s: float) -> list[str]:
    def or_dash(value: float | None) -> str:
        return "-" if value is None else digits(value)

    return [
        digits(figures.rate_rps),
        digits(plan.result.bound),
        _gap(plan.result.gap),
        or_dash(figures.usd_per_hour),
        or_dash(figures.usd_per_million_output_tokens),
        digits(figures.ttft_s),
        digits(1e3 * figures.tpot_s),
        tokens(figures.kv_tokens),
        f"{figures.gpus_used:,} ({figures.gpus_idle:,})",
        _solve_time(solve_s),
    ]


def _gap(gap: float) -> str:
    return percent(gap) if gap <= _WIDEST_GAP else f">{percent(_WIDEST_GAP)}"


def _solve_time(solve_s: float) -> str:
    return f"{solve_s:.1f}" if solve_s < 99.95 else f"{solve_s:,.0f}"


def _reasons(without: Sequence[Compared], label: Callable[[Compared], str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for outcome in without:
        reasons = "\n".join(outcome.reasons[:_LINES_PER_REASON])
        table.add_row(f" {label(outcome)}", f"{outcome.status}: {reasons}")
    return table
