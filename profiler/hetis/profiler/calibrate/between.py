"""The time between two iterations in a log, which their elapsed times exclude, by the clock of the lines.

An iteration with a request that is past its first token follows at once on the one before, which had it too. In such
a stretch, the clock less the time waited so far rises equally with every iteration: by the slope of a line through all
of them, which a clock of whole seconds blurs little. A pause of the host or a leap of the clock looks like a rise as
well. Long ones end a stretch. To find the others, long stretches are divided, and those with an unusual slope left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from statistics import median_low

import numpy as np

from hetis.formats.vllm_logs import IterationLog, LoggedIteration

_LEAST_STRETCH_STEPS = 5.0  # in steps of the clock: a shorter stretch is dominated by rounding
_LEAST_PART_STEPS = 10.0  # likewise, where a longer stretch is divided
_PARTS = 16  # into which the time of an engine is divided at most
_PAUSE_S = 2.0  # shortest pause that ends a stretch; a shorter one may be a server that logs late
_UNUSUAL = 0.5  # distance of a slope from the median, as a share of the mean wait
_ROUNDING = 0.29  # standard deviation of what is cut off a time, in steps of the clock
_LEAST_CERTAINTY = 0.05  # largest standard error of the time between waits, as a share of the mean wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Between:
    """``seconds`` is the mean from the end of one wait to the start of the next; None: the clock cannot tell."""

    seconds: float | None
    num_pauses: int  # pauses and leaps that are not part of it
    paused_s: float


def between_iterations(log: IterationLog) -> Between:
    """Return the mean time between the iterations of a log, over all servers and engines."""
    used, pauses = list[list[_Stretch]](), list[float]()
    for server in log.servers:
        engines = defaultdict[int, list[LoggedIteration]](list)
        for one in server.iterations:
            engines[one.engine].append(one)
        for iterations in engines.values():
            stretches = list(_stretches(iterations, log.clock_step_s, pauses))
            used.append(_usual([one for one in stretches if one.waited_s >= _LEAST_STRETCH_STEPS * log.clock_step_s]))
    return Between(seconds=_mean_s(used, log.clock_step_s), num_pauses=len(pauses), paused_s=sum(pauses))


def _mean_s(engines: Sequence[Sequence[_Stretch]], clock_step_s: float) -> float | None:
    """Return the mean over the iterations of all engines, by the stretches of each, or None if it is not certain."""
    total, sum_s, variance, waited_s = 0, 0.0, 0.0, 0.0
    for stretches in filter(None, engines):
        count, spread = (sum(len(one.waits_s) for one in stretches), sum(one.spread for one in stretches))
        total += count
        sum_s += count * sum(one.slope_s * one.spread for one in stretches) / spread
        variance += count**2 * (_ROUNDING * clock_step_s) ** 2 / spread
        waited_s += sum(one.waited_s for one in stretches)
    if not total or sqrt(variance) > _LEAST_CERTAINTY * waited_s:
        return None
    return max(0.0, sum_s / total)


@dataclass(frozen=True)
class _Stretch:
    """Iterations without a pause between them: their waits and the clock after each of them."""

    waits_s: list[float]
    clocks_s: list[float]

    @cached_property
    def waited_s(self) -> float:
        """Time waited, without the first iteration, which began before the clock of the stretch."""
        return sum(self.waits_s[1:])

    @cached_property
    def spread(self) -> float:
        """Sum of the squares of the iterations' numbers from their mean."""
        count = len(self.waits_s)
        return count * (count**2 - 1) / 12

    @cached_property
    def slope_s(self) -> float:
        """Rise of the clock by iteration, less the wait."""
        rests_s = np.array(self.clocks_s) - self.clocks_s[0] - np.cumsum([0.0, *self.waits_s[1:]])
        numbers = np.arange(len(rests_s)) - (len(rests_s) - 1) / 2
        return float(numbers @ rests_s) / self.spread


def _usual(stretches: Sequence[_Stretch]) -> list[_Stretch]:
    """Return the stretches of an engine whose slopes are like those of most. Of two, the smaller one is right, since
    pauses only add to it.
    """
    if not stretches:
        return []
    usual_s = median_low(one.slope_s for one in stretches)
    return [one for one in stretches if abs(one.slope_s - usual_s) <= _UNUSUAL * one.waited_s / len(one.waits_s)]


def _stretches(
    iterations: Sequence[LoggedIteration], clock_step_s: float, pauses: list[float]
) -> Iterator[_Stretch]:  # fmt: skip
    """Yield the stretches of an engine, and add to ``pauses`` those that end one."""
    longest_s = max(_LEAST_PART_STEPS * clock_step_s, sum(one.elapsed_s for one in iterations) / _PARTS)
    waits, clocks, waited_s = list[float](), list[float](), 0.0
    index = 0  # of the last iteration
    for one in iterations:
        if clocks:
            rise_s = -1.0 if one.clock_s is None else one.clock_s - clocks[-1]  # a clock set back tells nothing
            goes_on = rise_s >= 0 and one.index == index + 1 and one.generation_requests > 0
            if goes_on and rise_s - one.elapsed_s > clock_step_s + _PAUSE_S:
                pauses.append(rise_s - one.elapsed_s)
                goes_on = False
            if not goes_on or waited_s >= longest_s:
                yield _Stretch(waits, clocks)
                # The last iteration of a part begins the next one.
                waits, clocks, waited_s = (waits[-1:], clocks[-1:], 0.0) if goes_on else ([], [], 0.0)
        if one.clock_s is not None and not one.is_dummy:
            waits.append(one.elapsed_s)
            clocks.append(one.clock_s)
            waited_s += one.elapsed_s if len(waits) > 1 else 0.0
            index = one.index

    if clocks:
        yield _Stretch(waits, clocks)
