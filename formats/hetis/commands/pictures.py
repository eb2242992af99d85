"""Figures of matplotlib as files: a PNG, or a page of HTML that has the drawing in it and needs no network."""

from __future__ import annotations

import io
from html import escape
from typing import Any

FORMS = (".html", ".png")


def file_of(figure: Any, title: str, form: str) -> bytes:
    """Return a titled figure as a file of a form of `FORMS`, drawn without a browser."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.suptitle(title)
    buffer = io.BytesIO()
    if form == ".png":
        figure.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()
    figure.savefig(buffer, format="svg")
    drawing = buffer.getvalue().decode()
    head = f'<!doctype html>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
    return (head + drawing[drawing.index("<svg") :]).encode()
