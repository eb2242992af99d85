"""The search for the highest rate at which simulated traffic keeps a plan's latency limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

BELOW = (0.97, 0.94, 0.88, 0.76, 0.5, 0.25, 0.125)  # shares of a rate that misses a limit, which are tried in turn
PRECISE = 1 / 64  # the search ends when a rate that misses a limit is so little above one that keeps them
LESS = (0.97, 0.94, 0.91, 0.85, 0.7, 0.5)  # shares of a rate that kept in short runs but not in long ones
COARSE = 0.07  # a larger step between two of these shares is searched for a rate in between; also the step above it
MOST_HIGHER = 5  # such steps above a rate that kept in long runs at once


class CancelledError(Exception):
    """A simulation was cancelled."""


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
        seems_sure: whether short runs at a rate keep the limits by more than chance.
        is_sure: whether long ones do. The wide intervals of short runs exclude rates that long runs show to be kept.
    """

    def __init__(self, seems_sure: Callable[[float], bool], is_sure: Callable[[float], bool]) -> None:
        self._short, self._long = seems_sure, is_sure
        self._likely: list[float] = []  # rates that short runs keep
        self._missed_rps = math.inf  # lowest rate that long runs miss

    @property
    def likely_rps(self) -> float | None:
        """The highest rate that short runs keep, if no long run has missed the limits there or below."""
        return max((rate_rps for rate_rps in self._likely if rate_rps < self._missed_rps), default=None)

    def highest(self, missed_rps: float, at_least_rps: float) -> float | None:
        """Return the highest rate found below one that misses a limit; None: none of those tried keeps the limits.

        Rates below ``at_least_rps`` are not of interest.
        """
        low = high = missed_rps
        for share in BELOW:
            low, high = max(share * missed_rps, at_least_rps), low
            if low >= high:
                return None
            if self._seems_sure(low):
                break
        else:
            return None
        while high - low > PRECISE * high:
            middle = (low + high) / 2.0
            low, high = (middle, high) if self._seems_sure(middle) else (low, middle)
        return self._sure_near(low, at_least_rps=at_least_rps, below_rps=missed_rps)

    def _sure_near(self, rate_rps: float, *, at_least_rps: float, below_rps: float) -> float | None:
        """Return the highest rate found that keeps the limits in long runs, if ``rate_rps`` does in short ones.

        If this is cancelled after one such rate was found, the highest so far is returned. None: no rate that was tried
        is kept.
        """
        if self._is_sure(rate_rps):
            with suppress(CancelledError):
                for _ in range(MOST_HIGHER):
                    higher_rps = (1.0 + COARSE) * rate_rps
                    if higher_rps >= below_rps or not self._is_sure(higher_rps):
                        break
                    rate_rps = higher_rps
            return rate_rps
        kept = missed = 1.0  # shares of the rate
        for share in LESS:
            kept, missed = max(share, at_least_rps / rate_rps), kept
            if kept >= missed:
                return None
            if self._is_sure(kept * rate_rps):
                break
        else:
            return None
        with suppress(CancelledError):
            while missed - kept > COARSE:
                middle = (missed + kept) / 2.0
                kept, missed = (middle, missed) if self._is_sure(middle * rate_rps) else (kept, middle)
        return kept * rate_rps

    def _seems_sure(self, rate_rps: float) -> bool:
        kept = self._short(rate_rps)
        if kept:
            self._likely.append(rate_rps)
        return kept

    def _is_sure(self, rate_rps: float) -> bool:
        kept = self._long(rate_rps)
        if not kept:
            self._missed_rps = min(self._missed_rps, rate_rps)
        return kept
