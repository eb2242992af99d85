"""The table of the costs of a plan's constraints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from hetis.planner.report.figures import digits
from hetis.planner.report.plan import section

if TYPE_CHECKING:
    from hetis.solver.wish_prices import WishPrice


def render_wish_prices(prices: Sequence[WishPrice], unit: str) -> RenderableType:
    """Return what the objective would gain without each constraint, and without all."""
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("without", overflow="fold")
    table.add_column(f"gain, {unit}", justify="right")
    for price in prices:
        name = str(price.will[0]) if len(price.will) == 1 else f"all {len(price.will)} together"
        table.add_row(name, _interval(price))
    return section("What the wishes cost", table)


def _interval(price: WishPrice) -> str:
    low, high = digits(price.least), digits(price.most)
    if not price.is_solved:
        return f"at most {high}, not solved again"
    return low if low == high else f"{low} to {high}"
