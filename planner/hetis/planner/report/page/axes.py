"""Charts of lines: axes with round ticks, limits drawn across, and intervals around lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from hetis.planner.report.blocks import COLORS, Chart, CurveBlock, Tick
from hetis.planner.report.figures import digits
from hetis.planner.report.simulation.pictures import Line, Panel
from hetis.simulator.values import FloatArray

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 40
MAX_POINTS = 250  # points per line: more cannot be distinguished at this width
MAX_DOTS = 40  # points that are also drawn as dots, on a line with intervals
ROOM = 1.06  # the axis ends at this multiple of the highest value


def chart_of(panel: Panel) -> Chart:
    """Return the drawn panel."""
    xs = np.concatenate([line.x[np.isfinite(line.x)] for line in panel.lines] or [np.zeros(1)])
    tops = [_tops(line) for line in panel.lines]
    highest = max([*(float(top.max()) for top in tops if len(top)), *panel.limits, 0.0]) * ROOM or 1.0
    x_axis = _Axis(float(xs.max(initial=0.0)) or 1.0)
    y_axis = _Axis(highest)

    def x_at(values: FloatArray) -> FloatArray:
        return LEFT + (WIDTH - LEFT - RIGHT) * x_axis.shares(values)

    def y_at(values: FloatArray) -> FloatArray:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y_axis.shares(values)

    def curve(number: int, line: Line) -> CurveBlock:
        kept = np.isfinite(line.x) & np.isfinite(line.y)
        chosen = np.flatnonzero(kept)
        chosen = chosen[np.linspace(0, len(chosen) - 1, min(len(chosen), MAX_POINTS)).astype(np.int64)]
        x, y = x_at(line.x[chosen]), y_at(line.y[chosen])
        spread, dots = "", list[tuple[float, float]]()
        if line.spread is not None:
            half = np.nan_to_num(line.spread[chosen])
            upper, lower = y_at(line.y[chosen] + half), y_at(np.maximum(line.y[chosen] - half, 0.0))
            spread = _path(np.concatenate([x, x[::-1]]), np.concatenate([upper, lower[::-1]])) + "Z"
            dots = [(round(float(a), 1), round(float(b), 1)) for a, b in zip(x, y, strict=True)][:MAX_DOTS]
        return CurveBlock(line.name, number % COLORS, number >= COLORS, _path(x, y), spread, dots)

    return Chart(
        title=panel.title,
        x_title=panel.x_title,
        y_title=panel.y_title,
        width=WIDTH,
        height=HEIGHT,
        x_ticks=[Tick(_one(x_at, value), text) for value, text in x_axis.ticks()],
        y_ticks=[Tick(_one(y_at, value), text) for value, text in y_axis.ticks()],
        curves=[curve(number, line) for number, line in enumerate(panel.lines) if len(line.x)],
        limits=[Tick(_one(y_at, limit), f"limit {digits(limit)}") for limit in panel.limits],
    )


def _tops(line: Line) -> FloatArray:
    top = line.y if line.spread is None else line.y + np.nan_to_num(line.spread)
    return top[np.isfinite(top)]


def _one(place: Callable[[FloatArray], FloatArray], value: float) -> float:
    return round(float(place(np.array([value]))[0]), 1)


def _path(x: FloatArray, y: FloatArray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


class _Axis:
    """A linear axis from zero to ``high``."""

    def __init__(self, high: float) -> None:
        self._high = high if high > 0.0 else 1.0

    def shares(self, values: FloatArray) -> FloatArray:
        return np.clip(values / self._high, 0.0, 1.0)

    def ticks(self) -> Sequence[tuple[float, str]]:
        step = _round_step(self._high / 4)
        return [(i * step, f"{i * step:,.10g}") for i in range(int(self._high / step + 1e-9) + 1)]


def _round_step(about: float) -> float:
    """Return 1, 2 or 5 times a power of ten, the smallest that is at least ``about``."""
    power = 10.0 ** math.floor(math.log10(about))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= about * (1 - 1e-9))
