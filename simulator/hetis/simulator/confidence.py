"""95% confidence intervals: over runs with different seeds, and within one run from its sections."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hetis.simulator.values import FloatArray

SECTIONS = 10
MIN_SECTION = 20  # observations of each, for an interval within a run

# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom (Fisher and Yates, table III); then an upper bound.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An estimate and its error: ``half_width`` of its 95% interval, NaN if nothing is known about it."""

    value: float
    half_width: float = math.nan

    @property
    def relative(self) -> float:
        """Return the half width over the value; infinite if either is unknown."""
        if self.half_width == 0:
            return 0.0
        return self.half_width / abs(self.value) if self.half_width > 0 and self.value else math.inf

    def is_below(self, limit: float) -> bool:
        """Return whether the whole interval is below the limit."""
        return self.value + self.half_width <= limit

    def is_above(self, limit: float) -> bool:
        """Return whether the whole interval is above the limit."""
        return self.value - self.half_width > limit


def t_quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t, from 1 degree of freedom; beyond 30 at most 0.1% above the true one."""
    return _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.5 / degrees


def over_runs(values: Sequence[float]) -> Estimate:
    """Return the mean of independent runs and its t-interval; runs without a value (NaN) are left out."""
    known = np.array([value for value in values if math.isfinite(value)])
    if len(known) < 2:
        return Estimate(value=float(known[0]) if len(known) else math.nan)
    spread = float(known.std(ddof=1)) / math.sqrt(len(known))
    return Estimate(value=float(known.mean()), half_width=t_quantile(len(known) - 1) * spread)


def within_run(series: FloatArray, statistic: Callable[[FloatArray], float]) -> Estimate:
    """Return a statistic of a steady series and an interval from its consecutive sections.

    Observations of one run depend on one another, but long sections are nearly independent. The value is that of the
    whole series (a percentile of a short section is biased), the spread that of the sections around it. For a mean this
    is the method of batch means. Source: Asmussen and Glynn, "Stochastic Simulation" (2007), III.5a, sectioning.
    """
    if not len(series):
        return Estimate(value=math.nan)
    value = float(statistic(series))
    if len(series) < SECTIONS * MIN_SECTION:
        return Estimate(value=value)
    sections = [float(statistic(section)) for section in np.array_split(series, SECTIONS)]
    variance = sum((section - value) ** 2 for section in sections) / (SECTIONS - 1) / SECTIONS
    return Estimate(value=value, half_width=t_quantile(SECTIONS - 1) * math.sqrt(variance))
