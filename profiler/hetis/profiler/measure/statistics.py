"""How often to repeat a measurement, and what the repetitions say. Pure: the timer and the clock are arguments."""

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
        limit_s: stop after this long, warm-up included, known well or not.
        batch_s: calls are timed in batches at least this long, so that the timer's own error vanishes.
        warm_up_s: calls before the first batch that counts.
    """

    spread: float = 0.02
    limit_s: float = 1.0
    batch_s: float = 2e-3
    warm_up_s: float = 0.05
    min_batches: int = 5
    max_batches: int = 100
    max_calls: int = 200  # of a batch


def sample(time_calls: Callable[[int], float], clock: Callable[[], float], rule: SamplingRule) -> TimedSample:
    """Times one point until the rule is content.

    Args:
        time_calls: runs the operator n times in a row and returns the seconds they took together.
        clock: seconds that only grow; used for the limits, never for the result.
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
    """Half-width of the 95% order-statistic interval of the median, relative to it; below 3 samples it is 1."""
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
