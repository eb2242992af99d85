"""Curves of a benchmark as HTML, and as PNG where matplotlib happens to be installed; under ``benchmarks/results/``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring.rows import Row

RESULTS = Path(__file__).parents[1] / "results"
LABELS = {"gpus": "GPUs", "types": "GPU types"}
SERIES = {"seconds": "solved and bound", "to_1_percent_s": "gap of 1% proved"}


def draw_cost(rows: Sequence[Row], *, across: str, name: str) -> None:
    """Seconds of every row against its column ``across``."""
    RESULTS.mkdir(exist_ok=True)
    _draw_html(rows, across, RESULTS / f"{name}.html")
    if importlib.util.find_spec("matplotlib") is not None:
        _draw_png(rows, across, RESULTS / f"{name}.png")
    print(f"drawn: {RESULTS / name}.html", file=sys.stderr)


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
    # By name: matplotlib is no dependency, so that type checkers need not find it either.
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
