"""Rows that constraints add to the master: a minimum of GPUs in use, limits on replicas, and a maximum rent.

The relaxation that prices columns omits them. Its bound still holds with them, if weaker: a GPU that must be used has a
negative price, which pricing does not support. Whole counts always keep them, and the exact search of small fleets has
them in its relaxation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis.solver.constraints import ConstraintIndex, Sum
from hetis.solver.placement.classes import DeviceClass, IntArray, Resources
from hetis.solver.placement.tables import FloatArray

ROUNDING = 1e-6  # ratio by which HiGHS may miss a row


@dataclass(frozen=True, slots=True)
class Pins:
    """P rows ``lower <= sum_k (use_k of_rows + each) n_k <= upper``; ``of_rows`` is [rows, P], the others [P]."""

    of_rows: FloatArray
    each: FloatArray
    lower: FloatArray
    upper: FloatArray

    def coefficients(self, uses: IntArray) -> FloatArray:
        """Return the coefficients of columns with these uses [K, rows]; [K, P]."""
        found: FloatArray = uses @ self.of_rows + self.each
        return found

    def are_kept(self, uses: IntArray, counts: IntArray) -> bool:
        """Return whether these numbers of replicas of every column satisfy the rows."""
        sums = counts @ self.coefficients(uses)
        room = ROUNDING * np.maximum(1.0, np.abs(sums))
        return bool(np.all(sums >= self.lower - room) and np.all(sums <= self.upper + room))

    @property
    def ask_for_gpus(self) -> bool:
        """Return whether some rows require GPUs in use, so that the same rate with fewer GPUs may be worse."""
        return bool(self.wanted.any())

    @property
    def wanted(self) -> FloatArray:
        """Return the columns of `of_rows` that require GPUs in use, [rows, .]."""
        return self.of_rows[:, np.isfinite(self.lower)]

    @property
    def dear(self) -> FloatArray:
        """Return the columns of `of_rows` that limit GPUs, [rows, .]."""
        return self.of_rows[:, np.isfinite(self.upper) & self.of_rows.any(axis=0)]


def pins_of(index: ConstraintIndex | None, classes: tuple[DeviceClass, ...], resources: Resources) -> Pins | None:
    """Return the rows that a problem's constraints require, or None without any."""
    if index is None or not index.has_rows:
        return None
    used, count = len(index.least), len(index.least) + len(index.most) + 1
    of_rows = np.zeros((len(resources.rows), count))
    for row, (g, p) in enumerate(resources.rows):
        if p == 1:
            of_rows[row, sorted(classes[g].constraints.counts_for)] = 1.0
            of_rows[row, used:-1] = [unit_of(classes[g], each.of) for each in index.most]
    each = np.zeros(count)
    each[-1] = 1.0
    least, most = index.replicas
    lower = np.array([*index.least, *[-np.inf] * len(index.most), least], dtype=float)
    upper = np.array([*[np.inf] * used, *[each.most for each in index.most], most], dtype=float)
    return Pins(of_rows, each, lower, upper)


def unit_of(c: DeviceClass, of: Sum) -> float:
    """Return what one GPU of a class adds to a sum."""
    return 1.0 if of is Sum.GPUS else c.usd_per_hour or 0.0
