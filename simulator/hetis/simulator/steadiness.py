"""From when on a run is steady: what comes before is warm-up and is not measured."""

from __future__ import annotations

import math

import numpy as np

from hetis.simulator.values import FloatArray

BATCH = 5
MIN_BATCHES = 10
ROUNDING = 1e-12
MAX_GROWTH = 0.05  # of the requests measured may pile up, or twice the root of their number, and it is still steady


def warm_up(series: FloatArray) -> int:
    """Observations to leave out at the start of a series, by MSER-5: half of them at most.

    Means of five observations each; the cut is where the standard error of the mean of what follows is least. Cuts in
    the second half are not looked at: in a short series with a long tail, one rare observation would draw them there.
    Of fewer than 50 observations, which are too few to tell, half is left out.

    Source: White, "An effective truncation heuristic for bias reduction in simulation output", Simulation 69 (1997);
    its batches of five: White, Cobb and Spratt, "A comparison of five steady-state truncation heuristics", WSC 2000.
    """
    batches = len(series) // BATCH
    if batches < MIN_BATCHES:
        return len(series) // 2
    means = series[: batches * BATCH].reshape(batches, BATCH).mean(axis=1)
    means -= means.mean()  # squares of what is left lose fewer digits
    # For every cut d: batches behind it, their mean and their sum of squared distances from it.
    behind = np.arange(batches, 0, -1)
    total, squares = np.cumsum(means[::-1])[::-1], np.cumsum((means * means)[::-1])[::-1]
    error = np.maximum(squares - total * total / behind, 0.0) / behind**2
    error = error[: batches // 2 + 1]
    return int(np.argmax(error <= error.min() + ROUNDING * error[0])) * BATCH  # the first of those that are equal


def grows(*, arrived: int, finished: int) -> bool:
    """Whether requests pile up: more came in a window than left it, by more than chance explains."""
    return arrived - finished > max(MAX_GROWTH * arrived, 2 * math.sqrt(arrived))
