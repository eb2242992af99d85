"""The outcome of any search: chosen templates, their value, a bound, and the prices of the rows."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.solver.errors import BrokenProofError
from hetis.solver.placement.master import MilpSolution
from hetis.solver.placement.tables import FloatArray
from hetis.solver.placement.template import Template

ROUNDING = 1e-6  # ratio by which value and bound, both sums of rounded numbers, may cross


def sound_bound(bound: float, value: float, *, maximises: bool) -> float:
    """Return ``bound``, or ``value`` if rounding has put ``bound`` on the wrong side of it.

    Raises:
        BrokenProofError: they cross by more than rounding explains.
    """
    beyond = value - bound if maximises else bound - value
    if beyond > ROUNDING * abs(value):
        raise BrokenProofError(f"a plan of value {value:.9g} contradicts the bound {bound:.9g}; please report this")
    return value if beyond > 0.0 else bound


def relative_gap(incumbent: MilpSolution | None, bound: float) -> float:
    """Return the distance between a plan and a bound as a ratio of the plan's value, or inf without a plan."""
    if incumbent is None:
        return float("inf")
    return abs(bound - incumbent.value) / max(abs(incumbent.value), 1e-12)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a search; ``value`` and ``bound`` are in requests/s, or in USD/h or GPUs if cost is minimised."""

    chosen: tuple[tuple[Template, int], ...]
    value: float
    bound: float
    row_prices: FloatArray  # duals of the master's rows, at the bound
    rate_prices: FloatArray  # [sides] value of one more request/s on that side, at the bound
    flows: FloatArray  # [Z, Z] requests/s prefilled in the first zone and decoded in the second
    runners_up: tuple[Template, ...] = ()
    interrupted: bool = False
    best: Outcome | None = None  # the best outcome, if a simpler one replaced it
