"""The knowledge of a surface from the points measured so far: a Gaussian process over logarithms.

``log t(x) = linear + smooth + noise`` with ``x`` the logarithms of the sizes. Its standard deviation at an unmeasured
point is, to first order, the relative error to expect there; measuring where it is largest is the classical design for
interpolation. Only the choice of points uses it: profiles are fitted separately.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_LINEAR_VARIANCE = 4.0  # of slopes in log-log: sizes enter times with powers between 0 and 2
_LENGTHS = (1.0, 2.0, 4.0)  # of the smooth part, in factors of e
_VARIANCES = (0.005, 0.02, 0.08, 0.3)  # of the smooth part: it bends by 7%, 14%, 28% or 55%
_LEAST_NOISE = 0.01  # relative; no timer is better than this from call to call


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogatePrediction:
    """Seconds expected at each candidate, and their relative errors."""

    seconds: FloatArray
    uncertainty: FloatArray


def predict(
    points: FloatArray, seconds: FloatArray, spreads: FloatArray, candidates: FloatArray
) -> SurrogatePrediction:
    """Return the surface at ``candidates``.

    Args:
        points: logarithms of the measured sizes, shape [measured, axes].
        seconds: times there, all > 0, shape [measured].
        spreads: relative half-widths of those times, shape [measured].
        candidates: logarithms of the sizes to predict, shape [candidates, axes].
    """
    centre = points.mean(axis=0)
    x, z = points - centre, candidates - centre
    level = float(np.log(seconds).mean())
    y = np.log(seconds) - level
    noise = np.diag(np.maximum(spreads / 2, _LEAST_NOISE) ** 2)
    best, best_evidence = (_LENGTHS[0], _VARIANCES[-1]), -math.inf
    for length in _LENGTHS:
        for variance in _VARIANCES:
            evidence = _log_evidence(_kernel(x, x, length, variance) + noise, y)
            if evidence > best_evidence:
                best, best_evidence = (length, variance), evidence
    length, variance = best
    lower = np.linalg.cholesky(_kernel(x, x, length, variance) + noise)
    cross = _kernel(x, z, length, variance)
    whitened = np.linalg.solve(lower, cross)
    mean = whitened.T @ np.linalg.solve(lower, y)
    prior = variance + _LINEAR_VARIANCE * (1.0 + (z**2).sum(axis=1))
    deviation = np.sqrt(np.maximum(prior - (whitened**2).sum(axis=0), 0.0))
    return SurrogatePrediction(seconds=np.exp(mean + level), uncertainty=deviation)


def _kernel(a: FloatArray, b: FloatArray, length: float, variance: float) -> FloatArray:
    """Return a linear kernel plus a Matern 5/2 one: twice differentiable, so that kinks of rooflines are not smoothed
    away.
    """
    distance = np.sqrt(((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=2)) * (math.sqrt(5.0) / length)
    smooth = (1.0 + distance + distance**2 / 3.0) * np.exp(-distance)
    result: FloatArray = variance * smooth + _LINEAR_VARIANCE * (1.0 + a @ b.T)
    return result


def _log_evidence(covariance: FloatArray, y: FloatArray) -> float:
    lower = np.linalg.cholesky(covariance)
    whitened = np.linalg.solve(lower, y)
    return -0.5 * float(whitened @ whitened) - float(np.log(np.diag(lower)).sum())
