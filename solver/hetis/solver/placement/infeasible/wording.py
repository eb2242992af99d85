"""Numbers in the form of options: three digits, never on the wrong side of what was shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from hetis.solver.placement.infeasible.requirements import Requirement


def listed(requirements: Iterable[Requirement]) -> str:
    *most, last = map(str, requirements)
    return f"{', '.join(most)} and {last}" if most else last


def option_up(seconds: float) -> str:
    """Return a time as an option, rounded up."""
    return _as_option(seconds, lambda value: -rounded_down(-value))


def option_down(seconds: float) -> str:
    """Return a time as an option, rounded down."""
    return _as_option(seconds, rounded_down)


def _as_option(seconds: float, rounded: Callable[[float], float]) -> str:
    return f"{rounded(seconds):g}s" if seconds >= 1.0 else f"{rounded(seconds * 1e3):g}ms"


def rounded_down(value: float) -> float:
    """Return three digits of a value, not above it."""
    if value == 0.0:
        return 0.0
    places = 2 - math.floor(math.log10(abs(value)))
    return round(math.floor(value * 10.0**places) / 10.0**places, max(0, places))
