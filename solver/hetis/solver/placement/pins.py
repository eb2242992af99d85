"""Rows of the master that wishes ask for: GPUs in use at least, replicas at least and at most.

The relaxation that prices columns leaves them out, so that its bound holds with them too, if weaker: a GPU that must be
used has a negative price, and pricing knows none. Whole counts keep them always, and the exact search of small fleets
has them in its relaxation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis.solver.placement.classes import DeviceClass, IntArray, Resources
from hetis.solver.placement.tables import FloatArray
from hetis.solver.will import Marks


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
        return bool(np.all(sums >= self.lower - 0.5) and np.all(sums <= self.upper + 0.5))

    @property
    def ask_for_gpus(self) -> bool:
        """Whether some want GPUs to be used, so that a replica that does the same with fewer may not be as good."""
        return bool(self.of_rows.any())


def pins_of(marks: Marks | None, classes: tuple[DeviceClass, ...], resources: Resources) -> Pins | None:
    """The rows that a problem's marks ask for; None without any."""
    if marks is None or not marks.has_rows:
        return None
    count = len(marks.least) + 1
    of_rows = np.zeros((len(resources.rows), count))
    for row, (g, p) in enumerate(resources.rows):
        if p == 1:
            of_rows[row, sorted(classes[g].mark.counts_for)] = 1.0
    each = np.zeros(count)
    each[-1] = 1.0
    least, most = marks.replicas
    lower = np.array([*marks.least, least], dtype=float)
    upper = np.array([*[np.inf] * len(marks.least), most], dtype=float)
    return Pins(of_rows, each, lower, upper)
