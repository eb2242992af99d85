"""Retries of watches after a lost connection: when to try again, and when to give up."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from hetis.planner.client.errors import CallError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0


@dataclass(slots=True, kw_only=True)
class Patience:
    """The limit on retries of a watch that gets no answer.

    Attributes:
        limit_s: of the time without an answer; after it the watch ends with the error. 0: the first error ends it.
        jitter: returns a number from 0 to 1, so that many clients do not return at once.
    """

    limit_s: float = 60.0
    jitter: Callable[[], float] = field(default=random.random)
    _waited_s: float = field(default=0.0, init=False)
    _attempts: int = field(default=0, init=False)

    def answered(self) -> None:
        """Note an answer: a later failure starts a new series of retries."""
        self._waited_s, self._attempts = 0.0, 0

    def next_wait_s(self, error: CallError | None) -> float:
        """Return how long to wait before the next attempt.

        Args:
            error: the error that ended the stream; None if it ended with OK although there is more to come.

        Raises:
            CallError: the error itself, if waiting does not help or it lasted too long.
        """
        if error is not None and (error.code is not grpc.StatusCode.UNAVAILABLE or self._waited_s >= self.limit_s):
            raise error
        longest = min(FIRST_WAIT_S * 2.0**self._attempts, LONGEST_WAIT_S)
        asked_s = (error.retry_after_s or 0.0) if error is not None else 0.0
        wait_s = max(longest * self.jitter(), asked_s)
        self._attempts += 1
        self._waited_s += max(wait_s, FIRST_WAIT_S / 10)  # jitter near 0 must not make it endless
        return wait_s
