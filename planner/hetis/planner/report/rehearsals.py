"""A rehearsal of the loop on one screen: what following traffic costs and keeps, beside what it is held to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from hetis.planner.loop.curves import TrafficCurve
from hetis.planner.loop.rehearsal import Rehearsal
from hetis.planner.report.figures import digits, percent
from hetis.planner.report.tables import as_group, section, table_of
from hetis.planner.use_cases.json_values import document, fields_of

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
    yield table_of(
        found,
        ("'", lambda one: one.name),
        ("USD", lambda one: "-" if one.usd is None else f"{one.usd:,.0f}"),
        ("GPU-hours", lambda one: f"{one.gpu_hours:,.0f}"),
        ("saved", lambda one: "-" if one is static else percent(saving(one, static))),
        ("outside limits", lambda one: percent(one.outside)),
        ("changes", lambda one: f"{len(one.changes):,}"),
        ("drifts", lambda one: f"{one.alarms:,}"),
    )
    yield Text(
        "All begin with the static plan, for the peak. Outside limits: of all requests, those that come while the rate "
        "is above what keeps the limits, or while a queue lasts.",
        style="dim",
    )
    if loop.changes:
        changes = table_of(
            loop.changes,
            ("at", lambda one: f"{(one.at_s - curve.start_s) / 3600:.1f} h"),
            ("GPUs", lambda one: f"{one.gpus}"),
            ("up to /s", lambda one: digits(one.capacity_rps, 4)),
            ("'why", lambda one: one.reason),
            most=SHOWN,
            noun="change",
        )
        yield section("The loop's changes", changes)


def rehearsals_document(found: Sequence[Rehearsal], curve: TrafficCurve) -> dict[str, Any]:
    return document(
        "Rehearsal",
        curve={"name": curve.name, "peak_rps": curve.peak_rps(), "hours": found[0].hours},
        followers=[
            {
                "saved": saving(one, found[0]),
                **fields_of(one, "name", "usd", "gpu_hours", "requests", "outside"),
                "drifts": one.alarms,
                "changes": [
                    {"at_s": each.at_s - curve.start_s, **fields_of(each, "gpus", "capacity_rps", "reason")}
                    for each in one.changes
                ],
            }
            for one in found
        ],
    )
