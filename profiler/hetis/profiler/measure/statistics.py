"""Decides how often to repeat a measurement, and evaluates the repetitions. Pure: timer and clock are arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from hetis.profiler.measure.points import TimedSample

# Half the width, in ranks, of the 95% order-statistic interval of a median is 0.98 sqrt(n).
_RANKS_95 = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRule:
    """Rule for when a point has been repeated enough.

    Attributes:
        spread: stop when the median is known this well, relative.
        limit_s: stop after this long including warm-up, whether or not it is known well.
        batch_s: calls are timed in batches at least this long, so that the timer's own error is negligible.
        warm_up_s: calls before the first batch that counts.
    """

    spread: float = 0.02
    limit_s: float = 1.0
    batch_s: float = 2e-3
    warm_up_s: float = 0.05
    min_batches: int = 5
    max_batches: int = 100
    max_calls: int = 200  # per batch


def sample(time_calls: Callable[[int], float], clock: Callable[[], float], rule: SamplingRule) -> TimedSample:
    """Time one point until the rule is satisfied.

    Args:
        time_calls: runs the operator n times in succession and returns the total seconds.
        clock: monotonic seconds; used for the limits, never for the result.
        rule: when to stop.
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
