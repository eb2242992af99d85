"""A rehearsal of the loop on one screen: what following traffic costs and keeps, beside what it is held to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from hetis.planner.loop.curves import TrafficCurve
from hetis.planner.loop.rehearsal import Rehearsal
from hetis.planner.report.figures import digits, percent, plural
from hetis.planner.report.tables import as_group, section, table
from hetis.planner.use_cases.json_values import document

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
