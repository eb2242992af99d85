"""Pictures as one HTML file that needs no network. Needs plotly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hetis.profiler.pictures.pairs import Pairs

_HEIGHT = 330  # per row of pictures, in pixels
_LIMIT = 50.0  # percent at the ends of the colour scale


def html(pairs: Sequence[Pairs], title: str) -> str:
    """Draw, per operator, measured against fitted times, and the mean residual of each region."""
    titles = [
        text
        for one in pairs
        for text in (f"{one.title}: MAPE {one.mape:.1%} of all points", "fitted / measured - 1, %")
    ]
    rows = len(pairs)
    figure = make_subplots(rows=rows, cols=2, subplot_titles=titles, vertical_spacing=0.35 / max(rows, 2))
    for row, one in enumerate(pairs, start=1):
        ends = [float(min(one.measured.min(), one.fitted.min())), float(max(one.measured.max(), one.fitted.max()))]
        texts = [" x ".join(label for label in region if label) for region in one.regions]
        figure.add_trace(
            go.Scatter(
                x=one.measured,
                y=one.fitted,
                mode="markers",
                marker={"size": 5, "opacity": 0.6, "color": "#2a6fbb"},
                text=texts,
                hovertemplate="%{text}<br>measured %{x:.4g} s<br>fitted %{y:.4g} s<extra></extra>",
            ),
            row=row,
            col=1,
        )
        diagonal = go.Scatter(x=ends, y=ends, mode="lines", line={"color": "#888", "dash": "dot"}, hoverinfo="skip")
        figure.add_trace(diagonal, row=row, col=1)
        figure.update_xaxes(type="log", title_text="measured, s", exponentformat="power", dtick=1, row=row, col=1)
        figure.update_yaxes(type="log", title_text="fitted, s", exponentformat="power", dtick=1, row=row, col=1)
        labels, columns, mean, count = one.by_region()
        percent = 100 * mean
        figure.add_trace(
            go.Heatmap(
                z=percent,
                x=columns,
                y=[label or " " for label in labels],
                text=np.where(np.isnan(percent), "", np.char.mod("%+.0f", np.nan_to_num(percent))),
                texttemplate="%{text}",
                customdata=count,
                hovertemplate="%{y} x %{x}: %{z:+.1f}% over %{customdata} points<extra></extra>",
                colorscale="RdBu_r",
                zmid=0,
                zmin=-_LIMIT,
                zmax=_LIMIT,
                showscale=row == 1,
            ),
            row=row,
            col=2,
        )
        figure.update_xaxes(type="category", title_text=one.axes[1].replace("_", " "), row=row, col=2)
        figure.update_yaxes(type="category", title_text=one.axes[0].replace("_", " "), row=row, col=2)
    figure.update_layout(title=title, height=_HEIGHT * rows + 120, showlegend=False, template="plotly_white")
    text: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return text
