"""What a search returns, whichever way it went: chosen templates, their value, a bound, and the prices of the rows."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.solver.errors import BrokenProofError
from hetis.solver.placement.master import MilpSolution
from hetis.solver.placement.tables import FloatArray
from hetis.solver.placement.template import Template

ROUNDING = 1e-6  # share by which value and bound may cross, both being sums of rounded numbers


def sound_bound(bound: float, value: float, *, maximises: bool) -> float:
    """``bound``, or ``value`` where rounding has put it on the wrong side of that.

    Raises:
        BrokenProofError: they cross by more than rounding explains.
    """
    beyond = value - bound if maximises else bound - value
    if beyond > ROUNDING * abs(value):
        raise BrokenProofError(f"a plan of value {value:.9g} contradicts the bound {bound:.9g}; please report this")
    return value if beyond > 0.0 else bound


def relative_gap(incumbent: MilpSolution | None, bound: float) -> float:
    """Between a plan and a bound, as a share of the plan's value; inf without a plan."""
    if incumbent is None:
        return float("inf")
    return abs(bound - incumbent.value) / max(abs(incumbent.value), 1e-12)


@dataclass(frozen=True, slots=True)
class Outcome:
    """``value`` and ``bound`` are in the master's unit: requests/s, or USD/h or GPUs where cost is minimised."""

    chosen: tuple[tuple[Template, int], ...]
    value: float
    bound: float
    row_prices: FloatArray  # duals of the master's rows, at the bound
    rate_prices: FloatArray  # [sides] what a request/s is worth there, at the bound
    flows: FloatArray  # [Z, Z] requests/s prefilled in one zone and decoded in another, or in the same
    runners_up: tuple[Template, ...] = ()
    interrupted: bool = False
    best: Outcome | None = None  # what was found before something simpler took its place
