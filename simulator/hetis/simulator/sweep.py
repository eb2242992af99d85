"""The highest rate that a plan serves within its latency limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hetis.simulator.metrics import Limits
from hetis.simulator.summary import Summary

MAX_ROUNDS = 24
STEP = 1.15  # factor of the first step up; each further step is twice as far, in powers of this
IDLE = 0.01  # of the starting rate: if even this is too much, no rate is within the limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A rate that was tried. ``sure``: its 95% intervals are on one side of every limit."""

    rate_rps: float
    summary: Summary
    within: bool
    sure: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All rates that were tried, from the lowest.

    Attributes:
        goodput_rps: the highest rate below which every tried rate is within the limits; 0: none is.
        beyond_rps: the lowest rate that is not within them; None: none was found, the search was stopped.
    """

    points: tuple[Point, ...]
    goodput_rps: float
    beyond_rps: float | None


def sweep(
    evaluate: Callable[[Sequence[float]], Sequence[Summary]],
    limits: Limits,
    *,
    start_rps: float,
    tolerance: float = 0.02,
    at_once: int = 1,
) -> Sweep:
    """Bracket the highest rate within the limits by increasing steps up, then divide the bracket.

    If the first rate is too high already, an almost idle fleet is tried next: limits that it misses are missed at every
    rate.

    Seeds draw the same lengths and gaps at every rate, only scaled, so that neighbouring rates differ by little except
    the load: a rate below one within the limits is rarely outside them.

    Args:
        evaluate: results at rates, all of one call together; fewer answers than rates end the search.
        start_rps: the first guess, such as the planned goodput.
        tolerance: width of the final bracket over its upper end.
        at_once: number of rates that are tried together.
    """
    tried: dict[float, Point] = {}
    low, high = 0.0, None
    for _ in range(MAX_ROUNDS):
        rates = _next_rates(low, high, start_rps=start_rps, tried=len(tried), at_once=at_once)
        answers = evaluate(rates)
        for rate, summary in zip(rates, answers, strict=False):
            tried[rate] = _judged(rate, summary, limits)
        low, high = _bracket(tried)
        done = high is not None and (high - low <= tolerance * high or high <= IDLE * start_rps)
        if done or len(answers) < len(rates):
            break
    return Sweep(points=tuple(tried[rate] for rate in sorted(tried)), goodput_rps=low, beyond_rps=high)


def judged_rates(summaries: Mapping[float, Summary], limits: Limits) -> Sweep:
    """Return the same answer from rates that were chosen beforehand, and the result at each."""
    tried = {rate: _judged(rate, summary, limits) for rate, summary in summaries.items()}
    low, high = _bracket(tried)
    return Sweep(points=tuple(tried[rate] for rate in sorted(tried)), goodput_rps=low, beyond_rps=high)


def _next_rates(low: float, high: float | None, *, start_rps: float, tried: int, at_once: int) -> list[float]:
    if high is None:
        return [start_rps * STEP ** (2**n - 1) for n in range(tried, tried + at_once)]
    if low == 0:
        return [IDLE * start_rps, *(high * part / at_once for part in range(1, at_once))]
    return [low + (high - low) * part / (at_once + 1) for part in range(1, at_once + 1)]


def _bracket(tried: dict[float, Point]) -> tuple[float, float | None]:
    """Return the highest rate with nothing outside the limits below it, and the lowest outside."""
    low = 0.0
    for rate in sorted(tried):
        if not tried[rate].within:
            return low, rate
        low = rate
    return low, None


def _judged(rate_rps: float, summary: Summary, limits: Limits) -> Point:
    within = summary.within(limits)
    pairs = ((summary.ttft_p95_s, limits.ttft_s), (summary.mean_tpot_s, limits.tpot_s))
    known = [(estimate, limit) for estimate, limit in pairs if limit is not None]
    below = all(estimate.is_below(limit) for estimate, limit in known)
    above = any(estimate.is_above(limit) for estimate, limit in known)
    sure = summary.steady is True and below if within else summary.steady is False or above
    return Point(rate_rps=rate_rps, summary=summary, within=within, sure=sure)
