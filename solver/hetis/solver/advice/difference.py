"""The difference between two fleets, as proved by two solves.

Each solve gives a plan of value v and a bound b, between which the best plan's value lies. So the best value after the
change minus the best value before lies in

    [v_after - b_before, b_after - v_before]        if the objective is maximised
    [b_after - v_before, v_after - b_before]        if it is minimised

If GPUs were only added, every plan from before is still a plan, and if they were only removed, every plan from after
was one before. Values and bounds then hold for both sides, which narrows the interval. This holds inside one zone only:
with several, a replica's share of the links between them shrinks as the fleet grows (docs/cost-model.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

EXACT = 1e-6  # ratio to the larger value below which an interval counts as a number


class Change(StrEnum):
    """The relation between two fleets' sets of plans."""

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
    """The best plan found and the bound on all; without a plan 0 (infinity if the objective is minimised)."""

    value: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Difference of the best plans, after minus before, in the objective's unit: between ``low`` and ``high``.

    ``found`` is the difference of the two plans that were found.
    """

    low: float
    high: float
    found: float
    verdict: Verdict


def difference(before: Proven, after: Proven, *, maximises: bool, change: Change) -> Difference:
    """Return what the two proofs imply; an unknown side gives an infinite end, never NaN."""
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
    """Return ``a - b``, or ``unknown`` if both are the same infinity."""
    return unknown if math.isinf(a) and a == b else a - b


def _verdict(low: float, high: float, exact: float, *, maximises: bool) -> Verdict:
    if max(abs(low), abs(high)) <= exact:
        return Verdict.SAME
    if low > 0.0:
        return Verdict.BETTER if maximises else Verdict.WORSE
    if high < 0.0:
        return Verdict.WORSE if maximises else Verdict.BETTER
    return Verdict.UNDECIDED
