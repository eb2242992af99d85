"""The change between two plans of the same model: the fate of every replica, and the cost of the change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetis.planner.report.dispatch import plain_table
from hetis.planner.report.figures import digits, gigabytes, percent, plural
from hetis.planner.report.plan import section
from hetis.planner.use_cases.diff import PlanDiff
from hetis.planner.use_cases.json_values import json_value
from hetis.solver.plan import Plan, ReplicaPlan, Role
from hetis.solver.replanning.change import Fate, PlanChange, ReplicaChange

MAX_ROWS = 40  # changing replicas listed; -o json has all
MAX_LOADS = 16  # loading GPUs listed

_WORDS = {
    Fate.KEPT: "kept as it is",
    Fate.RESET: "other settings",
    Fate.CHANGED: "changed",
    Fate.NEW: "new",
    Fate.GONE: "gone",
}


def render_diff(diff: PlanDiff) -> RenderableType:
    """Return the table view, at most 80 columns wide if names allow it."""
    return Group(*_sections(diff))


def _sections(diff: PlanDiff) -> Iterator[RenderableType]:
    yield _figures(diff)
    for warning in diff.warnings:
        yield Text(warning, style="yellow")
    yield section("Replicas", Text(change_counts(diff.change)))
    yield from changed_replicas(diff.change, diff.before, diff.after)
    if diff.change.loads:
        yield section("Weights to load", load_table(diff.change))
    yield section("KV dropped", Text(dropped_words(diff.change)))


def _figures(diff: PlanDiff) -> Table:
    table = plain_table(("", "left"), ("before", "right"), ("after", "right"))
    plans, figures = (diff.before, diff.after), (diff.figures_before, diff.figures_after)
    results = [plan.result for plan in plans]
    table.add_row("objective", *(result.objective.value for result in results))
    table.add_row("rate /s", *(digits(f.rate_rps, 4) for f in figures), style="bold")
    table.add_row("value", *(f"{digits(result.value, 4)} {result.unit}" for result in results))
    table.add_row("gap", *(percent(result.gap) for result in results))
    table.add_row("used USD/h", *("-" if f.usd_per_hour is None else f"{f.usd_per_hour:,.2f}" for f in figures))
    table.add_row("GPUs (idle)", *(f"{f.gpus_used:,} ({f.gpus_idle:,})" for f in figures))
    table.add_row("TTFT ms", *(digits(1e3 * f.ttft_s) for f in figures))
    table.add_row("TPOT ms", *(digits(1e3 * f.tpot_s) for f in figures))
    return table


def change_counts(change: PlanChange) -> str:
    """Return ``2 kept, 1 changed, 1 new, 1 gone; 12 GPUs do something else``."""
    counts = ", ".join(f"{change.count(fate):,} {_WORDS[fate]}" for fate in Fate if change.count(fate))
    moved = plural(len(change.moved), "GPU")
    load = f", {gigabytes(change.load_bytes)} of weights to load" if change.loads else ""
    return f"{counts or 'none'}; {moved} to do something else than before{load}"


def dropped_words(change: PlanChange) -> str:
    """Return the KV of replicas that do not stay, assuming that they are full."""
    if not change.dropped_requests:
        return "none: every replica of before goes on"
    return (
        f"{gigabytes(change.dropped_kv_bytes)} of {plural(change.dropped_requests, 'request')} in flight "
        "where replicas are full; these start again"
    )


def changed_replicas(change: PlanChange, before: Plan, after: Plan) -> Iterator[RenderableType]:
    """Yield a row for every replica that does not simply continue."""
    rows = [c for c in change.replicas if c.fate is not Fate.KEPT]
    if not rows:
        return
    table = plain_table(
        ("before", "left"), ("after", "left"), ("", "left"), ("shape", "left"), ("rate /s", "right"), ("load", "right")
    )
    for row in rows[:MAX_ROWS]:
        table.add_row(*_row(row, before, after))
    yield table
    if len(rows) > MAX_ROWS:
        yield Text(f" … and {len(rows) - MAX_ROWS:,} more (-o json lists all)", style="dim")


def _row(change: ReplicaChange, before: Plan, after: Plan) -> list[str]:
    replica = after.replicas[change.after] if change.after is not None else before.replicas[change.before or 0]
    rates = [
        digits(plan.replicas[number].rate)
        for plan, number in ((before, change.before), (after, change.after))
        if number is not None
    ]
    return [
        "-" if change.before is None else f"#{change.before}",
        "-" if change.after is None else f"#{change.after}",
        _WORDS[change.fate],
        shape_of(replica),
        " → ".join(rates),
        "-" if not change.load_bytes else gigabytes(change.load_bytes),
    ]


def shape_of(replica: ReplicaPlan) -> str:
    """Return ``prefill: A100 TP4 L40 | L4 TP1 ×4 L40 + 2 workers``."""
    stages = []
    for i, stage in enumerate(replica.stages):
        workers = sum(len(pool.devices) for pool in replica.attention_workers if pool.stage == i)
        pool = f" + {plural(workers, 'worker')}" if workers else ""
        stages.append(f"{stage.gpu} {replica.parallel_sizes(stage)} L{stage.num_layers}{pool}")
    role = "" if replica.role is Role.UNIFIED else f"{replica.role}: "
    return role + " | ".join(stages)


def load_table(change: PlanChange) -> Table:
    """Return what GPUs load, the largest amounts first; equal amounts together."""
    by_size: dict[int, list[str]] = {}
    for device, size in change.loads.items():
        by_size.setdefault(round(size), []).append(device)
    table = plain_table(("each", "right"), ("GPUs", "right"), ("devices", "left"))
    sizes = sorted(by_size, reverse=True)
    for size in sizes[:MAX_LOADS]:
        names = by_size[size]
        shown = ", ".join(names[:8]) + (f", … {len(names) - 8:,} more" if len(names) > 8 else "")
        table.add_row(gigabytes(size), f"{len(names):,}", shown)
    if len(sizes) > MAX_LOADS:
        table.add_row("…", f"{sum(len(by_size[s]) for s in sizes[MAX_LOADS:]):,}", "(-o json lists all)")
    return table


def diff_document(diff: PlanDiff) -> dict[str, Any]:
    """Return the difference as plain data."""
    return {
        "apiVersion": "hetis/v1",
        "kind": "PlanDiff",
        "before": {"result": json_value(diff.before.result), "figures": json_value(diff.figures_before)},
        "after": {"result": json_value(diff.after.result), "figures": json_value(diff.figures_after)},
        "same_model": diff.same_model,
        "warnings": list(diff.warnings),
        "change": change_document(diff.change),
    }


def change_document(change: PlanChange) -> dict[str, Any]:
    """Return a change as plain data: counts, every replica, every GPU that loads."""
    return {
        "counts": {fate.value: change.count(fate) for fate in Fate},
        "moved_gpus": list(change.moved),
        "load_bytes": change.load_bytes,
        "dropped_requests": change.dropped_requests,
        "dropped_kv_tokens": change.dropped_kv_tokens,
        "dropped_kv_bytes": change.dropped_kv_bytes,
        "replicas": [json_value(replica) for replica in change.replicas],
        "loads": json_value(change.loads),
    }
