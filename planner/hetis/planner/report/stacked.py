"""Stacked bars that are readable with and without colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from hetis.planner.report.unbroken import Unbroken


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One part of a stacked bar: an amount, and how it is drawn."""

    name: str
    amount: float
    glyph: str
    style: str


def stacked_bar(shares: Sequence[Share], *, whole: float, width: int) -> Text:
    """Draw parts side by side in ``width`` characters that stand for ``whole``; the rest is a dotted line."""
    text, drawn, total = Text(), 0, 0.0
    for share in shares:
        total += share.amount
        end = min(width, round(width * total / whole)) if whole > 0 else 0
        text.append(share.glyph * (end - drawn), style=share.style)
        drawn = max(drawn, end)
    text.append("·" * (width - drawn), style="dim")
    return text


def legend(shares: Sequence[Share]) -> Unbroken:
    """Return the legend of the parts."""
    return Unbroken([Text.assemble((f"{s.glyph} ", s.style), (s.name, "dim")) for s in shares], "  ")
