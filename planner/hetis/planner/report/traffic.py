"""Measured traffic in a table, and rehearsals of following it, beside the plans to which they are held."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from hetis.planner.loop.curves import TrafficCurve
from hetis.planner.loop.rehearsal import Rehearsal
from hetis.planner.report.figures import digits, percent, plural, seconds
from hetis.planner.report.tables import as_group, section, table
from hetis.planner.use_cases.json_values import document
from hetis.planner.use_cases.speeds import Speed
from hetis.solver.traffic import TrafficSketch
from hetis.v1.traffic_pb2 import TrafficDecision

TRAFFIC_COLUMNS = ("'time", "requests/s", "prompt", "p95", "output", "p95", "hits", "TTFT p95", "TPOT")


def traffic_cells(name: str, one: TrafficSketch) -> Iterator[str]:
    """Yield the cells of a row: rate, mean and p95 lengths, prefix hits, latencies."""
    yield name
    yield digits(one.rate_per_s) if one.seconds else "-"
    for lengths in (one.prompt_tokens, one.output_tokens):
        yield f"{lengths.mean:.0f}" if lengths.count else "-"
        yield f"{lengths.quantile(0.95):.0f}" if lengths.count else "-"
    yield percent(one.prefix_hit_rate) if one.prompt_tokens.count else "-"
    yield seconds(one.ttft_s.quantile(0.95)) if one.ttft_s.count else "-"
    yield seconds(one.tpot_s.mean) if one.tpot_s.count else "-"


SPEED_COLUMNS = ("'replica", "'GPUs", "TPOT", "expected", "measured / expected", "'")


def speed_cells(one: Speed) -> Iterator[str]:
    """Yield the cells of a row: whose speed, beside what, the correction with its error, and what is slow."""
    yield one.replica.rpartition("/")[2] or "all"
    yield ", ".join(one.gpus)
    yield seconds(one.tpot_s)
    yield seconds(one.expected_s)
    yield f"{one.correction:.2f} ± {one.error:.2f}" if math.isfinite(one.error) else f"{one.correction:.2f}"
    yield "" if not one.is_slow else f"slow: {', '.join(one.devices)}" if one.replica else "slower than the profile"


def decision_lines(decision: TrafficDecision) -> Iterator[str]:
    """Yield what the planner would do about the traffic, why, and with which replicas."""
    yield decision.reason
    if decision.plan:
        yield f"Proposed: {decision.plan}."
    for one in decision.desired:
        yield f"{one.desired} (in force: {one.in_force}) × {one.shape}"


# --- rehearsals

SHOWN = 12  # changes of the loop; -o json has all


def saving(one: Rehearsal, static: Rehearsal) -> float:
    """Return the share of the static plan's cost that is saved; of its GPU-hours if GPUs have no prices."""
    if one.usd is None or not static.usd:
        return 1.0 - one.gpu_hours / static.gpu_hours
    return 1.0 - one.usd / static.usd


@as_group
def render_rehearsals(found: Sequence[Rehearsal], curve: TrafficCurve) -> Iterator[RenderableType]:
    static, loop = found[0], found[-1]
    yield Text(
        f"{curve.name}: {digits(static.hours)} hours, {static.requests:,.0f} requests, up to "
        f"{digits(curve.peak_rps(), 4)} a second",
        style="bold",
    )
    yield table(
        "'", "USD", "GPU-hours", "saved", "outside limits", "changes", "drifts",
        rows=(
            (
                one.name, "-" if one.usd is None else f"{one.usd:,.0f}", f"{one.gpu_hours:,.0f}",
                "-" if one is static else percent(saving(one, static)), percent(one.outside), f"{len(one.changes):,}",
                f"{one.alarms:,}",
            )
            for one in found
        ),
    )  # fmt: skip
    yield Text(
        "All begin with the static plan, for the peak. Outside limits: of all requests, those that come while the rate "
        "is above what keeps the limits, or while a queue lasts.",
        style="dim",
    )
    if loop.changes:
        yield section("The loop's changes", _changes(loop, curve))


def _changes(loop: Rehearsal, curve: TrafficCurve) -> RenderableType:
    rows = [
        (f"{(one.at_s - curve.start_s) / 3600:.1f} h", f"{one.gpus}", digits(one.capacity_rps, 4), one.reason)
        for one in loop.changes[:SHOWN]
    ]
    if (left := len(loop.changes) - SHOWN) > 0:
        rows.append(("…", "", "", f"{plural(left, 'more change')} (-o json lists all)"))
    return table("at", "GPUs", "up to /s", "'why", rows=rows)


def rehearsals_document(found: Sequence[Rehearsal], curve: TrafficCurve) -> dict[str, Any]:
    return document(
        "Rehearsal",
        curve={"name": curve.name, "peak_rps": curve.peak_rps(), "hours": found[0].hours},
        followers=[{"saved": saving(one, found[0]), **_fields(one, curve)} for one in found],
    )


def _fields(one: Rehearsal, curve: TrafficCurve) -> dict[str, Any]:
    changes = [
        {"at_s": each.at_s - curve.start_s, "gpus": each.gpus, "capacity_rps": each.capacity_rps, "reason": each.reason}
        for each in one.changes
    ]
    return {
        "name": one.name, "usd": one.usd, "gpu_hours": one.gpu_hours, "requests": one.requests, "outside": one.outside,
        "drifts": one.alarms, "changes": changes,
    }  # fmt: skip
