"""What a search returns, whichever way it went: chosen templates, their value, a bound, and the prices of the rows."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.solver.placement.tables import FloatArray
from hetis.solver.placement.template import Template


@dataclass(frozen=True, slots=True)
class Outcome:
    """``value`` and ``bound`` are in the master's unit: requests/s, or USD/h or GPUs where cost is minimised."""

    chosen: tuple[tuple[Template, int], ...]
    value: float
    bound: float
    row_prices: FloatArray  # duals of the master's rows, at the bound
    runners_up: tuple[Template, ...] = ()
    interrupted: bool = False
