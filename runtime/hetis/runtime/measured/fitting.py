"""Coefficients fitted to measured calls by least squares, under which more work never takes less time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from hetis.runtime.measured.coefficients import FloatArray, Piece

_LEAST_S = 1e-9  # a clock's tick: shorter times count as this


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedCall:
    """One layer's attention as measured: query heads, KV bytes that they read, seconds."""

    heads: float
    kv_bytes: float
    seconds: float


def fit_calls(calls: Sequence[TimedCall]) -> Piece:
    """Fit ``a heads + b kv_bytes + c`` with a, b, c >= 0 (Hetis, SC'25). All are 0 if nothing was measured.

    Errors are relative to the measurement, so short calls count as much as long ones.
    """
    if not calls:
        return 0.0, 0.0, 0.0
    matrix = np.array([[call.heads, call.kv_bytes, 1.0] for call in calls])
    seconds = np.maximum([call.seconds for call in calls], _LEAST_S)
    scale = matrix.max(axis=0)
    a, b, c = nonnegative_fit(matrix / scale / seconds[:, None], np.ones(len(calls))) / scale
    return float(a), float(b), float(c)


def nonnegative_fit(matrix: FloatArray, values: FloatArray) -> FloatArray:
    """Return the least squares coefficients >= 0, by trying every subset of the columns, of which there are three.

    Args:
        matrix: shape [samples, columns].
        values: shape [samples].
    """
    columns = matrix.shape[1]
    best, least = np.zeros(columns), float(values @ values)
    for size in range(1, columns + 1):
        for chosen in map(list, combinations(range(columns), size)):
            found = np.linalg.lstsq(matrix[:, chosen], values, rcond=None)[0]
            error = float(np.square(matrix[:, chosen] @ found - values).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(columns), error
                best[chosen] = found
    return best
