"""When and how quickly the store has answered."""

from __future__ import annotations

import contextlib
import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator

from hetis.planner.failures import Reason, ServiceError

QUIET_S = 5.0  # writes work again once a trial does, and no change has failed for so long
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class StoreHealth:
    """Counters of transactions, written by the store's threads and read by any other thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # of what is counted
        self._answered_s = clock()  # when the last transaction succeeded
        self._is_failing = False  # whether the last finished transaction failed
        self._unwritable_s: float | None = None  # when a write failed, with no write known to work since
        self._failed_s = -math.inf  # when a write last failed
        self.errors = 0  # number of failed transactions
        self.seconds = 0.0  # total duration of all transactions
        # Number of transactions by duration, up to that of each bucket in `BUCKETS_S`; the last is for longer ones
        self.buckets = [0] * (len(BUCKETS_S) + 1)

    @property
    def answered_s_ago(self) -> float:
        """Seconds since the last successful transaction."""
        return self._clock() - self._answered_s

    @property
    def failing_s(self) -> float:
        """How long no transaction has succeeded; 0 if the last finished one did."""
        return self.answered_s_ago if self._is_failing else 0.0

    @property
    def unwritable_s(self) -> float:
        """How long ago a write failed, with no write known to work since; 0 if writes work."""
        since_s = self._unwritable_s
        return 0.0 if since_s is None else self._clock() - since_s

    @property
    def is_unwritable(self) -> bool:
        return self._unwritable_s is not None

    def write_failed(self) -> None:
        """Note a write that failed because of the store."""
        self._failed_s = self._clock()
        if self._unwritable_s is None:
            self._unwritable_s = self._failed_s

    def trial_worked(self) -> None:
        """Note that a trial was written. On an almost full disk it fits where changes do not, so they have to end."""
        if self._clock() - self._failed_s >= QUIET_S:
            self.writes_work()

    def writes_work(self) -> None:
        """Note that writes work, as far as is known."""
        self._unwritable_s = None

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a transaction as failed if it raises STORE_UNAVAILABLE."""
        began_s = self._clock()
        has_failed = False
        try:
            yield
        except ServiceError as error:
            has_failed = error.reason == Reason.ERROR_REASON_STORE_UNAVAILABLE
            raise
        finally:
            now_s = self._clock()
            with self._lock:
                self.seconds += now_s - began_s
                self.buckets[bisect_left(BUCKETS_S, now_s - began_s)] += 1
                self._is_failing = has_failed
                if has_failed:
                    self.errors += 1
                else:
                    self._answered_s = now_s
