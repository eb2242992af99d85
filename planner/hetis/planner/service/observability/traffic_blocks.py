"""Measured traffic on the status page: windows, speeds, and the last decision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hetis.planner.convert.traffic import (
    SPEED_COLUMNS,
    TRAFFIC_COLUMNS,
    TrafficWindow,
    decision_lines,
    models_of,
    speed_cells,
    traffic_cells,
)
from hetis.planner.loop.speeds import Speed
from hetis.planner.report.blocks import Block, Grid, Sentences
from hetis.planner.resources.traffic import TrafficNow


def traffic_blocks(now: TrafficNow) -> Iterator[Block]:
    """Yield what there is to show."""
    if now.windows:
        yield _traffic(now.windows)
    if now.speeds:
        yield _speeds(now.speeds)
    if now.decision is not None and now.decision.reason:
        yield Sentences(title="Decision about the traffic", lines=tuple(decision_lines(now.decision)))


def _traffic(windows: Sequence[TrafficWindow]) -> Grid:
    models = models_of(windows)
    rows = (
        traffic_cells(name if len(models) == 1 else f"{model.name}, {name}", one)
        for model in models
        for name, one in model.periods()
    )
    note = "Lengths in tokens. hetis-plan traffic --out workload.yaml makes a workload of them."
    return Grid(title="Measured traffic", columns=TRAFFIC_COLUMNS, rows=tuple(map(tuple, rows)), bad=(), note=note)


def _speeds(speeds: Sequence[Speed]) -> Grid:
    rows = tuple(tuple(speed_cells(one)) for one in speeds)
    bad = tuple(number for number, one in enumerate(speeds) if one.is_slow)
    note = "Measured TPOT beside what the profiles say of as many requests, with its 95% interval."
    return Grid(title="Speed beside profiles", columns=SPEED_COLUMNS, rows=rows, bad=bad, note=note)
