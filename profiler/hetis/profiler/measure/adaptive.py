"""The request for a run, and the decisions what to measure next, how often, and when to stop.

Pure: it knows points and samples, not torch; timers and clocks are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import median

import numpy as np

from hetis.profiler.fitting import FloatArray
from hetis.profiler.measure.points import Measured, MeasuredPoint, PointSeries, TimedSample
from hetis.solver.model import ModelSpec

_FEW = 12  # points that a fit needs (hetis.profiler.fit)
_LINEAR_VARIANCE = 4.0  # variance of slopes in log-log: sizes enter times with powers between 0 and 2
_LENGTHS = (1.0, 2.0, 4.0)  # length scales of the smooth part, in factors of e
_VARIANCES = (0.005, 0.02, 0.08, 0.3)  # variances of the smooth part: it bends by 7%, 14%, 28% or 55%
_LEAST_NOISE = 0.01  # relative noise; no timer is better than this from call to call
# Half the width, in ranks, of the 95% order-statistic interval of a median is 0.98 sqrt(n).
_RANKS_95 = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingRule:
    """Rule for when a surface is known well enough."""

    uncertainty: float = 0.05  # largest relative error expected anywhere among the candidates
    min_points: int = 24  # limit per series, however smooth it looks: a fit holds some of them out
    max_points: int = 120  # limit per series, whatever remains unknown
    max_point_s: float = 2.0  # candidates expected to take longer than this per call are left out


@dataclass(frozen=True, slots=True)
class NextPoint:
    """The next point with the error expected there before it is measured (1 while too few points are known)."""

    series: str
    point: MeasuredPoint
    uncertainty: float


@dataclass(slots=True)
class SeriesState:
    """A series and its measurements so far."""

    series: PointSeries
    rule: StoppingRule
    measured: list[Measured] = field(default_factory=list)
    _next: NextPoint | None = None
    _is_stale: bool = True

    def add(self, found: Measured) -> None:
        self.measured.append(found)
        self._is_stale = True

    def next(self) -> NextPoint | None:
        """Return the candidate with the largest uncertainty, or None if all are known well enough."""
        if self._is_stale:
            chosen = self._choose()
            self._next = None if chosen is None else NextPoint(self.series.name, *chosen)
            self._is_stale = False
        return self._next

    def _choose(self) -> tuple[MeasuredPoint, float] | None:
        done = {found.point.key for found in self.measured}
        left = [point for point in self.series.candidates if point.key not in done]
        if not left or len(self.measured) >= self.rule.max_points:
            return None
        start = [point for point in first_points(self.series) if point.key not in done]
        if len(self.measured) < 2 and start:
            return start[0], 1.0
        at = self.predict(left)
        affordable = at.seconds <= self.rule.max_point_s
        values = [(left[index], float(at.uncertainty[index])) for index in np.flatnonzero(affordable)]
        keys = {point.key for point, _ in values}
        for point in start:
            if point.key in keys:
                return point, 1.0
        begun = {self.series.groups.get(key) for key in done} - {None}
        for point, uncertainty in values:
            if self.series.groups.get(point.key) in begun:
                return point, uncertainty
        if not values:
            return None
        worst, uncertainty = max(values, key=lambda value: value[1])
        if len(self.measured) < self.rule.min_points:
            return worst, 1.0
        return (worst, uncertainty) if uncertainty > self.rule.uncertainty else None

    def worst(self) -> float:
        """Return the largest relative error expected at any candidate, or 0 if all are known as well as required."""
        if (choice := self.next()) is not None:
            return choice.uncertainty
        if len(self.measured) < 2:
            return 0.0
        # Nothing is left to measure, but that does not mean that it is known: medians vary too.
        at = self.predict(self.series.candidates)
        worst = float(np.where(at.seconds <= self.rule.max_point_s, at.uncertainty, 0.0).max())
        return worst if worst > self.rule.uncertainty else 0.0

    def predict(self, points: Sequence[MeasuredPoint]) -> SurrogatePrediction:
        """Return the prediction of the measured points for others."""
        return predict(
            self.series.logs(found.point for found in self.measured),
            np.array([found.sample.seconds for found in self.measured]),
            np.array([found.sample.spread for found in self.measured]),
            self.series.logs(points),
        )


class Campaign:
    """All series together: the next point is the one with the largest uncertainty over all of them."""

    def __init__(self, series: Iterable[PointSeries], rule: StoppingRule) -> None:
        self.states = [SeriesState(series=one, rule=rule) for one in series]
        self._state_of = {point.key: state for state in self.states for point in state.series.candidates}

    @property
    def measured(self) -> list[Measured]:
        """All measurements, series by series."""
        return [found for state in self.states for found in state.measured]

    def next(self) -> NextPoint | None:
        """Return what to measure now, or None if all is known well enough. Ties go to the series with fewest points."""
        choices = [(state, choice) for state in self.states if (choice := state.next()) is not None]
        if not choices:
            return None
        return min(choices, key=lambda pair: (-pair[1].uncertainty, len(pair[0].measured)))[1]

    def add(self, found: Measured) -> None:
        self._state_of[found.point.key].add(found)

    def is_started(self) -> bool:
        """Return whether every series has as many points as a fit needs, or all that it can have."""
        return all(len(state.measured) >= _FEW or state.next() is None for state in self.states)

    def worst(self) -> float:
        """Return the largest relative error expected anywhere."""
        return max((state.worst() for state in self.states), default=0.0)


def first_points(series: PointSeries) -> list[MeasuredPoint]:
    """Return the points to begin with: for every axis its least, middle and greatest size, with the other axes in the
    middle, and the corners. Not every combination is a candidate, so they are the nearest ones.
    """
    candidates = series.logs(series.candidates)
    sizes = [np.unique(column) for column in candidates.T]
    middle = [values[len(values) // 2] for values in sizes]
    wanted = [[values[0] for values in sizes], middle]
    for axis, values in enumerate(sizes):
        wanted += [[*middle[:axis], value, *middle[axis + 1 :]] for value in (values[0], values[-1])]
    wanted.append([values[-1] for values in sizes])
    nearest = [int(np.abs(candidates - np.array(target)).sum(axis=1).argmin()) for target in wanted]
    return [series.candidates[index] for index in dict.fromkeys(nearest)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogatePrediction:
    """Seconds expected at each candidate, and their relative errors."""

    seconds: FloatArray
    uncertainty: FloatArray


def predict(
    points: FloatArray, seconds: FloatArray, spreads: FloatArray, candidates: FloatArray
) -> SurrogatePrediction:
    """Return the surface at ``candidates``, as a Gaussian process over logarithms knows it from the measured points.

    ``log t(x) = linear + smooth + noise`` with ``x`` the logarithms of the sizes. Its standard deviation at an
    unmeasured point is, to first order, the relative error to expect there; measuring where it is largest is the
    classical design for interpolation. Only the choice of points uses it: profiles are fitted separately.

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
    length, variance = max(
        product(_LENGTHS, _VARIANCES), key=lambda settings: _log_evidence(_kernel(x, x, *settings) + noise, y)
    )
    lower = np.linalg.cholesky(_kernel(x, x, length, variance) + noise)
    cross = _kernel(x, z, length, variance)
    whitened = np.linalg.solve(lower, cross)
    mean = whitened.T @ np.linalg.solve(lower, y)
    prior = variance + _LINEAR_VARIANCE * (1.0 + (z**2).sum(axis=1))
    deviation = np.sqrt(np.maximum(prior - (whitened**2).sum(axis=0), 0.0))
    return SurrogatePrediction(seconds=np.exp(mean + level), uncertainty=deviation)


def _kernel(a: FloatArray, b: FloatArray, length: float, variance: float) -> FloatArray:
    """Return a linear kernel plus a Matern 5/2 one: twice differentiable, so that it keeps the kinks of rooflines."""
    distance = np.sqrt(((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=2)) * (math.sqrt(5.0) / length)
    smooth = (1.0 + distance + distance**2 / 3.0) * np.exp(-distance)
    result: FloatArray = variance * smooth + _LINEAR_VARIANCE * (1.0 + a @ b.T)
    return result


def _log_evidence(covariance: FloatArray, y: FloatArray) -> float:
    lower = np.linalg.cholesky(covariance)
    whitened = np.linalg.solve(lower, y)
    return -0.5 * float(whitened @ whitened) - float(np.log(np.diag(lower)).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRule:
    """Rule for when a point has been repeated enough."""

    spread: float = 0.02  # stop when the median is known this well, relative
    limit_s: float = 1.0  # stop after this long including warm-up, whether or not it is known well
    batch_s: float = 2e-3  # calls are timed in batches at least this long, so that the timer's own error is negligible
    warm_up_s: float = 0.05  # duration of the calls before the first batch that counts
    min_batches: int = 5
    max_batches: int = 100
    max_calls: int = 200  # limit per batch


QUICK_RULES = (
    StoppingRule(uncertainty=0.12, min_points=14, max_points=30, max_point_s=0.25),
    SamplingRule(spread=0.05, limit_s=0.15, batch_s=1e-3, warm_up_s=0.01, max_batches=30),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """A request to measure a device."""

    device: str  # ``cpu``, ``cuda`` or ``cuda:1``
    gpu: str  # name of the GPU type in the result. Empty: the device's own name.
    model: ModelSpec
    quick: bool
    limit_s: float  # stop choosing new points after this time


def sample(time_calls: Callable[[int], float], clock: Callable[[], float], rule: SamplingRule) -> TimedSample:
    """Time one point until the rule is satisfied. ``time_calls`` runs the operator n times in succession and returns
    the total seconds; ``clock`` is used for the limits, never for the result.
    """
    start_s = clock()
    warm_s = time_calls(1)
    while clock() - start_s < min(rule.warm_up_s, rule.limit_s / 4):
        warm_s = min(warm_s, time_calls(1))
    calls = max(1, min(rule.max_calls, math.ceil(rule.batch_s / max(warm_s, 1e-9))))
    batches: list[float] = []
    while len(batches) < rule.max_batches:
        batches.append(time_calls(calls) / calls)
        if len(batches) >= rule.min_batches and spread_of_median(batches) <= rule.spread:
            break
        if clock() - start_s >= rule.limit_s and len(batches) >= 3:
            break
    return TimedSample(seconds=median(batches), spread=spread_of_median(batches), jitter=jitter(batches))


def spread_of_median(samples: Sequence[float]) -> float:
    """Return the half-width of the 95% order-statistic interval of the median, relative to it, or 1 below 3 samples."""
    ordered, size = sorted(samples), len(samples)
    if size < 3:
        return 1.0
    half = _RANKS_95 * math.sqrt(size)
    low = max(0, math.floor(size / 2 - half))
    high = min(size - 1, math.ceil(size / 2 + half) - 1)
    return (ordered[high] - ordered[low]) / 2 / median(ordered)


def jitter(samples: Sequence[float]) -> float:
    """Return how far the ninth decile lies above the median, relative to it."""
    ordered = sorted(samples)
    return ordered[math.ceil(0.9 * len(ordered)) - 1] / median(ordered) - 1.0
