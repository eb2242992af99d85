"""The store's health, for readiness checks and metrics, without a query to the store."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class StoreHealth:
    """Counters of transactions, written by the store's thread and read by any other.

    Attributes:
        errors: transactions that failed.
        seconds: duration of all transactions together.
        buckets: transactions by duration, at most that of the bucket in `BUCKETS_S`; the last counts the longer ones.
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
        """Return the seconds since the last successful transaction."""
        return self._clock() - self._answered_s

    @property
    def running_s(self) -> float:
        """Return how long the present transaction has been running, 0 if there is none."""
        began_s = self._began_s
        return 0.0 if began_s is None else self._clock() - began_s

    @property
    def failing_s(self) -> float:
        """Return for how long no transaction has succeeded, 0 if the last one that ended did."""
        return self.answered_s_ago if self._is_failing else 0.0

    def began(self) -> None:
        self._began_s, self._has_failed = self._clock(), False

    def failed(self) -> None:
        """Mark the present transaction as failed."""
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
