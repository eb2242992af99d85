"""Pictures as a PNG. Needs matplotlib, which draws without a browser (plotly's exporter would need Chrome)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from hetis.profiler.pictures.pairs import Pairs

_LIMIT = 50.0  # percent at the ends of the colour scale


def png(pairs: Sequence[Pairs], title: str) -> bytes:
    """Draw, per operator, measured against fitted times, and the mean residual of each region."""
    figure = Figure(figsize=(12, 3.6 * len(pairs) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.subplots(len(pairs), 2, squeeze=False, width_ratios=(1, 1.5))
    for (left, right), one in zip(grid, pairs, strict=True):
        ends = (min(one.measured.min(), one.fitted.min()), max(one.measured.max(), one.fitted.max()))
        left.scatter(one.measured, one.fitted, s=10, alpha=0.5, color="#2a6fbb", linewidths=0)
        left.plot(ends, ends, ":", color="#888888", linewidth=1)
        left.set(xscale="log", yscale="log", xlabel="measured, s", ylabel="fitted, s")
        for axis in (left.xaxis, left.yaxis):
            axis.set_minor_formatter(NullFormatter())  # labels between the powers of ten overlap
        left.set_title(f"{one.title}: MAPE {one.mape:.1%} of all points", fontsize=10)
        rows, columns, mean, _ = one.by_region()
        image = right.imshow(
            100 * mean, cmap="RdBu_r", vmin=-_LIMIT, vmax=_LIMIT, aspect="auto", origin="lower", interpolation="nearest"
        )
        right.set_xticks(range(len(columns)), columns)
        right.set_yticks(range(len(rows)), rows)
        right.set(xlabel=one.axes[1].replace("_", " "), ylabel=one.axes[0].replace("_", " "))
        right.set_title("fitted / measured - 1, %, mean of each region", fontsize=10)
        for y, x in zip(*np.nonzero(~np.isnan(mean)), strict=True):
            strong = abs(mean[y, x]) > 0.7 * _LIMIT / 100
            right.text(
                x, y, f"{round(100 * mean[y, x]):+d}", ha="center", va="center", fontsize=7,
                color="white" if strong else "black",
            )  # fmt: skip
        figure.colorbar(image, ax=right, pad=0.01)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
