"""The search for the highest rate at which simulated traffic keeps a plan's latency limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

BELOW = (0.97, 0.94, 0.88, 0.76, 0.5, 0.25, 0.125)  # shares of a rate that misses a limit, which are tried in turn
NEAR = (0.85, 0.7, 0.5, 0.25, 0.125)  # shares of a guessed rate
PRECISE = 1 / 32  # the search ends when a rate that misses a limit is so little above one that keeps them
LESS = (0.97, 0.94, 0.91, 0.85, 0.7, 0.5)  # shares of a rate that kept in short runs but not in long ones
COARSE = 0.07  # a larger step between two of these shares is searched for a rate in between; also the step above it
MOST_HIGHER = 5  # such steps above a rate that kept in long runs at once
USED_UP = -0.02  # excess from which on a kept rate is the highest for all that short runs can tell
BY_CHANCE = 0.05  # by which the excesses of two runs may differ
LEFT_OUT_TO = 0.5  # share of a missed rate down to which rates may be left out
INSIDE = 0.3  # share of a bracket that every step leaves out at least


class StoppedError(Exception):
    """A simulation was cancelled, or its time ran out."""


class KeptRate(NamedTuple):
    """A rate at which simulated traffic kept the limits, and the requests of the longest run that showed it."""

    rate_rps: float
    num_requests: int
    is_confirmed: bool  # whether long runs, of two kinds of traffic, kept them

    def notes(self) -> tuple[str, ...]:
        """Return what a plan's notes say about it."""
        if self.is_confirmed:
            return ()
        return (
            f"its simulation ended early: {self.rate_rps:.4g} requests/s kept the limits in a run of "
            f"{self.num_requests:,} requests, which longer runs have not confirmed",
        )


class LowerRates:
    """A search for the highest rate that keeps the limits. Short runs search for it, and longer ones decide.

    Args:
        seems_sure: whether short runs at a rate keep the limits by more than chance; None: they do, perhaps by chance.
        is_sure: whether long ones do, of the usual traffic and of other traffic, in turn. The wide intervals of short
            runs exclude rates that long runs show to be kept.
        excess: by how much of its limit a latency of a short run is above it at most, up to chance (negative: below);
            None: not known, such as where requests queue up without end. It grows ever faster with the rate.
    """

    def __init__(
        self, seems_sure: Callable[[float], bool | None], is_sure: Callable[[float], Iterable[bool]],
        excess: Callable[[float], float | None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._short, self._long, self._excess = seems_sure, is_sure, excess
        self._likely: list[float] = []  # rates that short runs keep by more than chance, or the first long run
        self._perhaps: list[float] = []  # rates that short runs keep, perhaps by chance
        self._excluded_rps = math.inf  # lowest rate that short runs miss by more than chance
        self._missed_rps = math.inf  # lowest rate that long runs miss

    @property
    def likely_rps(self) -> float | None:
        """The highest rate that a run keeps, by more than chance if there is one, and no long run has missed."""
        likely, perhaps = (
            [rate_rps for rate_rps in kept if rate_rps < self._missed_rps] for kept in (self._likely, self._perhaps)
        )
        return max(likely or perhaps, default=None)

    def highest(self, missed_rps: float, at_least_rps: float, likely_rps: float = math.inf) -> float | None:
        """Return the highest rate found below one that misses a limit; None: none of those tried keeps the limits.

        Rates below ``at_least_rps`` are not of interest. ``likely_rps`` is a guess, with which the search begins. If
        short runs leave all rates undecided that they do not exclude, as where a share of the requests misses a strict
        limit at any rate, long runs decide on each of them.
        """
        low, undecided = missed_rps, list[tuple[float, float]]()  # rates, each with the next higher one
        before: float | None = None  # the rate above the lowest that was missed
        guess = min(1.0, likely_rps / missed_rps)
        for share in BELOW if guess >= BELOW[0] else (guess, *(guess * share for share in NEAR)):
            low, high = max(share * missed_rps, at_least_rps), low
            if low >= high:
                break
            if before is not None and self._misses_too(low, high, before):
                low = high
                continue
            before, seems_sure = high, self._seems_sure(low)
            if seems_sure:
                return self._sure_near(self._highest_likely(low, high), at_least_rps=at_least_rps, below_rps=missed_rps)
            if seems_sure is None:
                undecided.append((low, high))
        kept = next(((rate_rps, high) for rate_rps, high in undecided if self._is_sure(rate_rps)), None)
        return None if kept is None else self._sure_between(*kept, step_rps=COARSE * kept[1])

    def _highest_likely(self, low: float, high: float) -> float:
        """Return the highest rate found that short runs keep, as they do the lower of these rates."""
        while high - low > PRECISE * high:
            below, above, share = self._excess(low), self._excess(high), 0.5
            if below is not None and USED_UP <= below <= 0.0:
                break
            if below is not None and above is not None and below < 0.0 < above:
                share = min(1.0 - INSIDE, max(INSIDE, -below / (above - below)))
            middle = low + share * (high - low)
            low, high = (middle, high) if self._seems_sure(middle) else (low, middle)
        return low

    def _misses_too(self, rate_rps: float, missed_rps: float, higher_rps: float) -> bool:
        """Return whether a rate below two missed ones must miss, too: the excess falls no faster below them.

        A higher rate whose run shows less, because queues had no time to grow, says nothing of that. As queues of two
        runs may have been cut off alike, no rate far below is left out.
        """
        if rate_rps <= LEFT_OUT_TO * missed_rps:
            return False
        lower, higher = self._excess(missed_rps), self._excess(higher_rps)
        if lower is None or higher is None or lower <= 0.0 or higher < lower - BY_CHANCE:
            return False
        steepness = (max(0.0, higher - lower) + BY_CHANCE) / (higher_rps - missed_rps)
        return lower > steepness * (missed_rps - rate_rps)

    def _sure_near(self, rate_rps: float, *, at_least_rps: float, below_rps: float) -> float | None:
        """Return the highest rate found that keeps the limits in long runs, if ``rate_rps`` does in short ones.

        If this is cancelled after one such rate was found, the highest so far is returned. None: no rate that was tried
        is kept.
        """
        if self._is_sure(rate_rps):
            with suppress(StoppedError):
                for _ in range(MOST_HIGHER):
                    higher_rps = (1.0 + COARSE) * rate_rps
                    if higher_rps >= below_rps or not self._is_sure(higher_rps):
                        return rate_rps
                    rate_rps = higher_rps
                high = min(below_rps, self._excluded_rps)  # up to which short runs left undecided what long ones keep
                return self._sure_between(rate_rps, high, step_rps=COARSE * rate_rps)
            return rate_rps
        low = rate_rps
        for share in LESS:
            low, high = max(share * rate_rps, at_least_rps), low
            if low >= high:
                return None
            if self._is_sure(low):
                return self._sure_between(low, high, step_rps=COARSE * rate_rps)
        return None

    def _sure_between(self, low: float, high: float, *, step_rps: float) -> float:
        """Return the highest rate found that long runs keep, as they do the lower of these rates and not the higher."""
        with suppress(StoppedError):
            while high - low > step_rps:
                middle = (low + high) / 2.0
                low, high = (middle, high) if self._is_sure(middle) else (low, middle)
        return low

    def _seems_sure(self, rate_rps: float) -> bool | None:
        kept = self._short(rate_rps)
        if kept:
            self._likely.append(rate_rps)
        elif kept is False:
            self._excluded_rps = min(self._excluded_rps, rate_rps)
        else:
            self._perhaps.append(rate_rps)
        return kept

    def _is_sure(self, rate_rps: float) -> bool:
        for kept in self._long(rate_rps):
            if not kept:
                self._missed_rps = min(self._missed_rps, rate_rps)
                return False
            self._likely.append(rate_rps)
        return True
