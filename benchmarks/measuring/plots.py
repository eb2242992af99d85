"""Figures of a benchmark in ``benchmarks/results/``, as HTML and, if matplotlib is installed, as PNG."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring.rows import Row
from tools import tables

RESULTS = Path(__file__).parents[1] / "results"
FIGURES = tables.DOCS / "figures"
LABELS = {"gpus": "GPUs", "types": "GPU types"}
SERIES = {"seconds": "solved and bound", "to_1_percent_s": "gap of 1% proved"}


def draw_cost(rows: Sequence[Row], *, across: str, name: str) -> None:
    """Draw the seconds of every row against its column ``across``."""
    RESULTS.mkdir(exist_ok=True)
    _draw_html(rows, across, RESULTS / f"{name}.html")
    if importlib.util.find_spec("matplotlib") is not None:
        _draw_png(rows, across, RESULTS / f"{name}.png")
    print(f"drawn: {RESULTS / name}.html", file=sys.stderr)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """Gaps of all instances of one size, to the proven bound and, for those judged, to the best plan known."""

    panel: str
    size: str
    relaxation: Sequence[float]
    best: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """A group of adjacent bars, one for each name."""

    panel: str
    group: str
    heights: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Search:
    """The progress of a search: seconds, value of the best plan, and bound; None while there is no plan or bound."""

    fleet: str
    objective: str
    curve: Sequence[tuple[float, float | None, float | None]]


MARKS = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"), (1.0, "max"))
COLORS = ("#0072b2", "#999999", "#e69f00", "#009e73", "#56b4e9", "#d55e00", "#cc79a7")
SHADES = {"to the best known": "#0072b2", "to the relaxation": "#e69f00"}


def draw_gaps(gaps: Sequence[Gaps], *, name: str, document: bool) -> None:
    """Draw quantiles of both gaps by size, one panel per load; with ``document`` also to ``docs/figures/`` (as SVG)."""
    RESULTS.mkdir(exist_ok=True)
    panels = {panel: [g for g in gaps if g.panel == panel] for panel in dict.fromkeys(g.panel for g in gaps)}
    _gaps_html(panels, RESULTS / f"{name}.html")
    if importlib.util.find_spec("matplotlib") is not None:
        paths = [RESULTS / f"{name}.png"]
        if document:
            FIGURES.mkdir(exist_ok=True)
            paths.append(FIGURES / f"{name}.svg")
        _gaps_pictures(panels, paths)
    print(f"drawn: {RESULTS / name}.html", file=sys.stderr)


def draw_bars(bars: Sequence[Bars], *, name: str, label: str, document: bool) -> None:
    """Draw groups of bars, one panel below another; with ``document`` also to ``docs/figures/`` (as SVG)."""
    RESULTS.mkdir(exist_ok=True)
    panels = {panel: [b for b in bars if b.panel == panel] for panel in dict.fromkeys(b.panel for b in bars)}
    _bars_html(panels, label, RESULTS / f"{name}.html")
    if importlib.util.find_spec("matplotlib") is not None:
        paths = [RESULTS / f"{name}.png"]
        if document:
            FIGURES.mkdir(exist_ok=True)
            paths.append(FIGURES / f"{name}.svg")
        _bars_pictures(panels, label, paths)
    print(f"drawn: {RESULTS / name}.html", file=sys.stderr)


def draw_searches(searches: Sequence[Search], *, name: str, document: bool) -> None:
    """Draw value and bound against time, a row of panels per fleet; with ``document`` to ``docs/figures/`` (as SVG)."""
    figures: Any = importlib.import_module("matplotlib.figure")
    fleets = list(dict.fromkeys(search.fleet for search in searches))
    objectives = list(dict.fromkeys(search.objective for search in searches))
    size = (3.1 * len(objectives), 2.1 * len(fleets) + 0.4)
    figure = figures.Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(fleets), len(objectives), squeeze=False)
    for search in searches:
        axis = axes[fleets.index(search.fleet), objectives.index(search.objective)]
        best = next((value for _, value, _ in reversed(search.curve) if value), 1.0)
        for label, at, color in (("bound", 2, COLORS[2]), ("plan", 1, COLORS[0])):
            points = [(point[0], value / best) for point in search.curve if (value := point[at]) is not None]
            if points:
                seconds, shares = zip(*points, strict=True)
                last_s = max(point[0] for point in search.curve)
                axis.step([*seconds, last_s], [*shares, shares[-1]], where="post", color=color, label=label)
                axis.plot(seconds, shares, ".", color=color, markersize=4)
        axis.set_title(f"{search.fleet}, {search.objective}", fontsize="small")
        axis.set_xlim(0, None)
        axis.set_ylim(0.9, 1.1)
        axis.tick_params(labelsize="x-small")
        axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", ncols=2, loc="outside upper center")
    figure.supxlabel("CPU seconds since the search began", fontsize="small")
    figure.supylabel("as a share of the last plan's value", fontsize="small")
    RESULTS.mkdir(exist_ok=True)
    paths = [RESULTS / f"{name}.png", *([FIGURES / f"{name}.svg"] if document else [])]
    for path in paths:
        figure.savefig(path, dpi=120)
    print(f"drawn: {', '.join(map(str, paths))}", file=sys.stderr)


def _bars_html(panels: dict[str, list[Bars]], label: str, path: Path) -> None:
    from plotly import graph_objects, subplots

    figure: Any = subplots.make_subplots(rows=len(panels), cols=1, subplot_titles=list(panels))
    for place, groups in enumerate(panels.values(), start=1):
        for number, bar in enumerate(groups[0].heights):
            trace = graph_objects.Bar(
                x=[group.group.replace("\n", "<br>") for group in groups],
                y=[group.heights[bar] for group in groups], name=bar, legendgroup=bar,
                marker={"color": COLORS[number % len(COLORS)]}, showlegend=place == 1,
            )  # fmt: skip
            figure.add_trace(trace, row=place, col=1)
    figure.update_layout(barmode="group", height=380 * len(panels))
    figure.update_yaxes(title=label)
    figure.write_html(path, include_plotlyjs="cdn")


def _bars_pictures(panels: dict[str, list[Bars]], label: str, paths: Sequence[Path]) -> None:
    figures: Any = importlib.import_module("matplotlib.figure")
    most = max(len(groups) for groups in panels.values())
    figure = figures.Figure(figsize=(max(6.0, 1.0 * most), 3.2 * len(panels)), layout="constrained")
    for axis, (panel, groups) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        names = list(groups[0].heights)
        width = 0.8 / len(names)
        for number, bar in enumerate(names):
            at = np.arange(len(groups)) + (number - (len(names) - 1) / 2) * width
            axis.bar(at, [group.heights[bar] for group in groups], width, label=bar, color=COLORS[number % len(COLORS)])
        axis.set(title=panel, ylabel=label)
        axis.set_xticks(range(len(groups)), [group.group for group in groups], fontsize="x-small")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", ncols=len(labels), loc="outside upper center")
    for path in paths:
        figure.savefig(path, dpi=120)


def _gaps_html(panels: dict[str, list[Gaps]], path: Path) -> None:
    from plotly import graph_objects, subplots

    figure: Any = subplots.make_subplots(rows=len(panels), cols=1, subplot_titles=list(panels))
    for place, gaps in enumerate(panels.values(), start=1):
        for label, shade in SHADES.items():
            for group in gaps:
                box = graph_objects.Box(
                    x=[group.size] * len(_values(group, label)), y=_values(group, label), name=label, legendgroup=label,
                    offsetgroup=label, line={"color": shade}, boxpoints="outliers",
                    showlegend=place == 1 and group is gaps[0],
                )  # fmt: skip
                figure.add_trace(box, row=place, col=1)
    figure.update_layout(boxmode="group", height=350 * len(panels))
    figure.update_yaxes(title="gap, %")
    figure.write_html(path, include_plotlyjs="cdn")


def _gaps_pictures(panels: dict[str, list[Gaps]], paths: Sequence[Path]) -> None:
    figures: Any = importlib.import_module("matplotlib.figure")
    figure = figures.Figure(figsize=(9, 3.2 * len(panels)), layout="constrained")
    for axis, (panel, gaps) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        for shift, (label, shade) in zip((-0.15, 0.15), SHADES.items(), strict=True):
            at = np.arange(len(gaps)) + shift
            marked = [np.quantile(_values(g, label), [m for m, _ in MARKS]) for g in gaps]
            low = [float(values[0]) for values in marked]
            axis.vlines(at, low, [float(values[-1]) for values in marked], color=shade, linewidth=1)
            for position, (_, mark) in enumerate(MARKS):
                axis.plot(
                    at, [float(values[position]) for values in marked], "_ov^"[position], color=shade,
                    label=f"{label}, {mark}",
                )  # fmt: skip
        axis.set(title=panel, ylabel="gap, %", ylim=(0, None))
        axis.set_xticks(range(len(gaps)), [group.size for group in gaps], rotation=30, ha="right", fontsize="small")
    figure.axes[0].legend(fontsize="x-small", ncols=2)
    for path in paths:
        figure.savefig(path, dpi=120)


def _values(gaps: Gaps, label: str) -> list[float]:
    """Return the gaps in percent."""
    chosen = gaps.best if label == "to the best known" else gaps.relaxation
    return [100 * gap for gap in chosen]


def _draw_html(rows: Sequence[Row], across: str, path: Path) -> None:
    from plotly import graph_objects

    figure = graph_objects.Figure()
    gaps = [f"gap {_percent(row['gap'])}, {row['peak_mib']:.0f} MiB" for row in rows]
    for key, label in SERIES.items():
        figure.add_scatter(
            x=[row[across] for row in rows], y=[row[key] for row in rows], text=gaps, name=label, mode="lines+markers"
        )
    figure.update_xaxes(title=LABELS[across], type=_scale(across))
    figure.update_yaxes(title="seconds", rangemode="tozero")
    figure.write_html(path)


def _draw_png(rows: Sequence[Row], across: str, path: Path) -> None:
    # Import by name, so that type checkers need not find matplotlib, which is not a dependency.
    figures: Any = importlib.import_module("matplotlib.figure")
    figure = figures.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in SERIES.items():
        points = [(row[across], row[key]) for row in rows if row[key] is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=label)
    axes.set(xlabel=LABELS[across], ylabel="seconds", xscale=_scale(across), ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def _scale(across: str) -> str:
    return "log" if across == "gpus" else "linear"


def _percent(gap: object) -> str:
    return f"{gap:.2%}" if isinstance(gap, float) else "unknown"
