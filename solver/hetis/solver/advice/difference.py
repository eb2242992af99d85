"""What two solves prove of the difference between two fleets.

Each solve gives a plan of value v and a bound b; the best plan's value lies between the two. So the best value after
the change less the best value before lies in

    [v_after - b_before, b_after - v_before]        where the objective is maximised
    [b_after - v_before, v_after - b_before]        where it is minimised

Where GPUs were only added, every plan from before is a plan still, and where they were only taken away, every plan
from after was one: values and bounds then hold for both sides, which narrows the interval. That is so inside one zone
only: among several, a replica's share of the links between them shrinks as the fleet grows (docs/cost-model.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

EXACT = 1e-6  # of the larger value: an interval narrower than this is a number


class Change(StrEnum):
    """How two fleets differ, as far as their plans go."""

    GROWN = "grown"  # every plan from before is one after
    SHRUNK = "shrunk"  # every plan from after was one before
    OTHER = "other"


class Verdict(StrEnum):
    BETTER = "better"
    WORSE = "worse"
    SAME = "same"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proven:
    """The best plan found and the bound on all; without a plan 0 (infinity where the objective is minimised)."""

    value: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Difference of the best plans, after less before, in the objective's unit: not below ``low``, not above ``high``.

    ``found`` is the difference of the two plans that were found.
    """

    low: float
    high: float
    found: float
    verdict: Verdict


def difference(before: Proven, after: Proven, *, maximises: bool, change: Change) -> Difference:
    """Return what the two proofs imply; infinite or NaN-free: an unknown side gives an infinite end."""
    (low0, high0), (low1, high1) = _span(before, maximises), _span(after, maximises)
    better_after = change is (Change.GROWN if maximises else Change.SHRUNK)  # the best value cannot fall
    better_before = change is (Change.SHRUNK if maximises else Change.GROWN)  # it cannot rise
    if better_after:
        low1, high0 = max(low1, low0), min(high0, high1)
    if better_before:
        low0, high1 = max(low0, low1), min(high1, high0)
    low, high = _less(low1, high0, -math.inf), _less(high1, low0, math.inf)
    if better_after:
        low = max(0.0, low)
    if better_before:
        high = min(0.0, high)
    found = _less(after.value, before.value, 0.0)
    scale = max((abs(v) for v in (low0, high0, low1, high1) if math.isfinite(v)), default=0.0)
    return Difference(low=low, high=high, found=found, verdict=_verdict(low, high, EXACT * scale, maximises=maximises))


def _span(side: Proven, maximises: bool) -> tuple[float, float]:
    """Return the interval of the best value."""
    return (side.value, side.bound) if maximises else (side.bound, side.value)


def _less(a: float, b: float, unknown: float) -> float:
    """``a - b``; ``unknown`` where both are infinite."""
    return unknown if math.isinf(a) and a == b else a - b


def _verdict(low: float, high: float, exact: float, *, maximises: bool) -> Verdict:
    if max(abs(low), abs(high)) <= exact:
        return Verdict.SAME
    if low > 0.0:
        return Verdict.BETTER if maximises else Verdict.WORSE
    if high < 0.0:
        return Verdict.WORSE if maximises else Verdict.BETTER
    return Verdict.UNDECIDED
