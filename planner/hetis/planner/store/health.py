"""How the store answers: what readiness and metrics are made of, without asking the store."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class StoreHealth:
    """Counts transactions. Written by the store's thread, read by anybody.

    Attributes:
        errors: transactions that the store could not do.
        seconds: all together.
        buckets: transactions that took as long as the bucket of `BUCKETS_S` at most; the last: longer.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._answered_s = clock()
        self._began_s: float | None = None
        self._has_failed = self._is_failing = False
        self.errors = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(BUCKETS_S) + 1)

    @property
    def answered_s_ago(self) -> float:
        """Since it last did what it was asked to."""
        return self._clock() - self._answered_s

    @property
    def running_s(self) -> float:
        """How long the present transaction takes already; 0: there is none."""
        began_s = self._began_s
        return 0.0 if began_s is None else self._clock() - began_s

    @property
    def failing_s(self) -> float:
        """How long it has done nothing of what it was asked to; 0: the last that ended was done."""
        return self.answered_s_ago if self._is_failing else 0.0

    def began(self) -> None:
        self._began_s, self._has_failed = self._clock(), False

    def failed(self) -> None:
        """The present one."""
        self._has_failed = True

    def ended(self) -> None:
        now_s = self._clock()
        took_s = now_s - (self._began_s if self._began_s is not None else now_s)
        self._began_s = None
        self.seconds += took_s
        self.buckets[bisect_left(BUCKETS_S, took_s)] += 1
        self._is_failing = self._has_failed
        if self._has_failed:
            self.errors += 1
        else:
            self._answered_s = now_s
