"""Times of the last tokens, and how many requests have ended: what an agent is told of them."""

from __future__ import annotations

from collections import deque

from hetis.runtime.steering.engine import ServedCounts

REMEMBERED = 64  # that means are taken of


class RecentTimes:
    """Kept by the thread of the engine. Attributes: ``counts``, up to date after each call."""

    def __init__(self) -> None:
        self.counts = ServedCounts()
        self._first_s: deque[float] = deque(maxlen=REMEMBERED)
        self._next_s: deque[float] = deque(maxlen=REMEMBERED)

    def first_token(self, seconds: float) -> None:
        self._first_s.append(seconds)
        self.counts.ttft_s = sum(self._first_s) / len(self._first_s)

    def next_token(self, seconds: float) -> None:
        self._next_s.append(seconds)
        self.counts.tpot_s = sum(self._next_s) / len(self._next_s)

    def finished(self) -> None:
        self.counts.num_finished += 1
