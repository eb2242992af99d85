"""The steady part of a run (everything before is warm-up, which is not measured), and 95% confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hetis.simulator.values import FloatArray

SECTIONS = 10
MIN_SECTION = 20  # observations per section, for an interval within a run

# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom (Fisher and Yates, table III); then an upper bound.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An estimate and its error: ``half_width`` is that of its 95% interval, NaN if unknown."""

    value: float
    half_width: float = math.nan

    def is_below(self, limit: float) -> bool:
        """Return whether the whole interval is below the limit."""
        return self.value + self.half_width <= limit

    def is_above(self, limit: float) -> bool:
        """Return whether the whole interval is above the limit."""
        return self.value - self.half_width > limit


def t_quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t for ``degrees`` >= 1; beyond 30 it is at most 0.1% too high."""
    return _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.5 / degrees


def over_runs(values: Sequence[float]) -> Estimate:
    """Return the mean of independent runs with its t-interval; runs without a value (NaN) are left out."""
    known = np.array([value for value in values if math.isfinite(value)])
    if len(known) < 2:
        return Estimate(value=float(known[0]) if len(known) else math.nan)
    spread = float(known.std(ddof=1)) / math.sqrt(len(known))
    return Estimate(value=float(known.mean()), half_width=t_quantile(len(known) - 1) * spread)


def within_run(series: FloatArray, statistic: Callable[[FloatArray], float]) -> Estimate:
    """Return a statistic of a steady series, with an interval from consecutive sections of the series.

    Observations of one run depend on one another, but long sections are nearly independent. The value is that of the
    whole series (a percentile of a short section is biased); the spread is that of the sections around it. For a mean
    this is the method of batch means. Source: Asmussen and Glynn, "Stochastic Simulation" (2007), III.5a, sectioning.
    """
    if not len(series):
        return Estimate(value=math.nan)
    value = float(statistic(series))
    if len(series) < SECTIONS * MIN_SECTION:
        return Estimate(value=value)
    sections = [float(statistic(section)) for section in np.array_split(series, SECTIONS)]
    variance = sum((section - value) ** 2 for section in sections) / (SECTIONS - 1) / SECTIONS
    return Estimate(value=value, half_width=t_quantile(SECTIONS - 1) * math.sqrt(variance))


BATCH = 5
MIN_BATCHES = 10
ROUNDING = 1e-12
FILLED = 95  # percentage of requests that have left by the time at which an initially empty fleet counts as full
MAX_GROWTH = 0.05  # greatest growth of the wait, in seconds per second of arrivals, for a load that is carried
# Standard deviations of the number of arrivals by which a growth must be below MAX_GROWTH, or above it.
CARRIED_CHANCE, GROWING_CHANCE = 1.5, 2.0
GROUPS = 10  # groups of requests whose waits determine how certain a growth is
MIN_GROUP = 5


def warm_up(series: FloatArray) -> int:
    """Return the number of observations to drop at the start of a series, by MSER-5: at most half of them.

    Observations are averaged in batches of five; the cut minimises the standard error of the mean of the remaining
    ones. Cuts in the second half are not considered: in a short series with a long tail, one rare observation would
    cause a cut there. With fewer than 50 observations, too few to tell, half are dropped.

    Source: White, "An effective truncation heuristic for bias reduction in simulation output", Simulation 69 (1997);
    its batches of five: White, Cobb and Spratt, "A comparison of five steady-state truncation heuristics", WSC 2000.
    """
    batches = len(series) // BATCH
    if batches < MIN_BATCHES:
        return len(series) // 2
    means = series[: batches * BATCH].reshape(batches, BATCH).mean(axis=1)
    means -= means.mean()  # smaller numbers lose fewer digits when squared
    # For every cut d: batches after it, their mean and their sum of squared deviations from it.
    behind = np.arange(batches, 0, -1)
    total, squares = np.cumsum(means[::-1])[::-1], np.cumsum((means * means)[::-1])[::-1]
    error = np.maximum(squares - total * total / behind, 0.0) / behind**2
    error = error[: batches // 2 + 1]
    return int(np.argmax(error <= error.min() + ROUNDING * error[0])) * BATCH  # the first of equally good cuts


def filled_s(arrival_s: FloatArray, end_to_end_s: FloatArray) -> float:
    """Return when a fleet that began empty is full, so that departures equal arrivals: after one request's stay."""
    return float(arrival_s[0]) + float(np.percentile(end_to_end_s, FILLED))


def growth(arrival_s: FloatArray, wait_s: FloatArray) -> Estimate:
    """Return the seconds by which the wait grows per second of arrivals, with its 95% interval.

    For a fleet that carries its load this is 0 in the long run. If mu of the lambda requests/s that arrive are served,
    the queue grows by ``lambda - mu`` and the wait by ``lambda / mu - 1``. A straight line is fitted through the mean
    waits of ten groups of requests in order of arrival: single waits depend on one another, groups hardly do. There is
    no interval for fewer than 50 requests, and no estimate (NaN) if all arrive at once.
    """
    if len(arrival_s) < 2 or arrival_s[-1] <= arrival_s[0]:
        return Estimate(value=math.nan)
    if len(arrival_s) < GROUPS * MIN_GROUP:
        return Estimate(value=float(np.polyfit(arrival_s - arrival_s.mean(), wait_s, 1)[0]))
    times, waits = (np.array([part.mean() for part in np.array_split(x, GROUPS)]) for x in (arrival_s, wait_s))
    times -= times.mean()
    spread = float(times @ times)
    if not spread:  # smaller than a float
        return Estimate(value=math.nan)
    slope = float(times @ waits) / spread
    rest = waits - waits.mean() - slope * times
    error = math.sqrt(float(rest @ rest) / (GROUPS - 2) / spread)
    return Estimate(value=slope, half_width=t_quantile(GROUPS - 2) * error)


def is_carried(found: Estimate, *, arrived: int) -> bool | None:
    """Return whether a load with this growth of the wait is carried; None if there are too few requests to tell.

    Arrivals bunch by chance: a number of n arrivals varies by sqrt(n), so a growth is known no better than 1 / sqrt(n).
    A load is carried if its growth is below the limit by 1.5 times that, which takes (1.5 / 5%)**2 = 900 requests if
    the wait does not fall; it is not carried if its growth is above the limit by twice that. At 1.5, M/M/1 at load 1.1,
    where waits grow by 10%, was judged as carried in at most 5 of 100 runs, from 200 to 8,000 requests
    (docs/simulator.md).
    """
    if math.isnan(found.half_width):
        return None
    chance = 1 / math.sqrt(max(arrived, 1))
    if _at_least(found, CARRIED_CHANCE * chance).is_below(MAX_GROWTH):
        return True
    return False if _at_least(found, GROWING_CHANCE * chance).is_above(MAX_GROWTH) else None


def _at_least(found: Estimate, half_width: float) -> Estimate:
    return Estimate(value=found.value, half_width=max(found.half_width, half_width))
