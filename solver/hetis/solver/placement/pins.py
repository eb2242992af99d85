"""Rows of the master that wishes ask for: GPUs in use at least, replicas at least and at most, a rent at most.

The relaxation that prices columns leaves them out, so that its bound holds with them too, if weaker: a GPU that must be
used has a negative price, and pricing knows none. Whole counts keep them always, and the exact search of small fleets
has them in its relaxation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis.solver.placement.classes import DeviceClass, IntArray, Resources
from hetis.solver.placement.tables import FloatArray
from hetis.solver.will import Marks, Sum

ROUNDING = 1e-6  # share by which HiGHS may miss a row


@dataclass(frozen=True, slots=True)
class Pins:
    """P rows ``lower <= sum_k (use_k of_rows + each) n_k <= upper``; ``of_rows`` [rows, P], the others [P]."""

    of_rows: FloatArray
    each: FloatArray
    lower: FloatArray
    upper: FloatArray

    def coefficients(self, uses: IntArray) -> FloatArray:
        """What columns with these uses [K, rows] count for, [K, P]."""
        found: FloatArray = uses @ self.of_rows + self.each
        return found

    def are_kept(self, uses: IntArray, counts: IntArray) -> bool:
        """Whether so many replicas of every column keep them."""
        sums = counts @ self.coefficients(uses)
        room = ROUNDING * np.maximum(1.0, np.abs(sums))
        return bool(np.all(sums >= self.lower - room) and np.all(sums <= self.upper + room))

    @property
    def ask_for_gpus(self) -> bool:
        """Whether some want GPUs to be used, so that a replica that does the same with fewer may not be as good."""
        return bool(self.wanted.any())

    @property
    def wanted(self) -> FloatArray:
        """Return the columns of `of_rows` that want GPUs, [rows, .]."""
        return self.of_rows[:, np.isfinite(self.lower)]

    @property
    def dear(self) -> FloatArray:
        """Return the columns of `of_rows` that limit GPUs, [rows, .]."""
        return self.of_rows[:, np.isfinite(self.upper) & self.of_rows.any(axis=0)]


def pins_of(marks: Marks | None, classes: tuple[DeviceClass, ...], resources: Resources) -> Pins | None:
    """The rows that a problem's marks ask for; None without any."""
    if marks is None or not marks.has_rows:
        return None
    used, count = len(marks.least), len(marks.least) + len(marks.most) + 1
    of_rows = np.zeros((len(resources.rows), count))
    for row, (g, p) in enumerate(resources.rows):
        if p == 1:
            of_rows[row, sorted(classes[g].mark.counts_for)] = 1.0
            of_rows[row, used:-1] = [unit_of(classes[g], wish.of) for wish in marks.most]
    each = np.zeros(count)
    each[-1] = 1.0
    least, most = marks.replicas
    lower = np.array([*marks.least, *[-np.inf] * len(marks.most), least], dtype=float)
    upper = np.array([*[np.inf] * used, *[wish.most for wish in marks.most], most], dtype=float)
    return Pins(of_rows, each, lower, upper)


def unit_of(c: DeviceClass, of: Sum) -> float:
    """What one GPU of a class adds to a sum."""
    return 1.0 if of is Sum.GPUS else c.usd_per_hour or 0.0
