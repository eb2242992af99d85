"""The share of the event loop that messages from agents may take, so that a flood of them does not delay calls."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

_READ_S = 0.0002  # what gRPC takes to read a message
_FIRST_S = 0.0002  # the time of a message before any was measured
_WEIGHT = 0.05  # of the last message in the mean time of one


class MessageBudget:
    """Gives streams their turns to read a message, in the order in which they ask.

    Messages take ``share`` of the time at most, in pieces of about ``slack_s``, between which other tasks run. A stream
    that waits reads nothing, so that HTTP/2's flow control stops its agent; heartbeats and reports arrive in order.
    """

    def __init__(
        self, *, share: float = 0.6, slack_s: float = 0.004, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._share, self._slack_s, self._clock = share, slack_s, clock
        self._mean_s = _FIRST_S  # of one message, without reading it
        self._free_s = clock()  # when the time of all turns so far is paid for
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def took(self, seconds: float) -> None:
        """Note the time in which a message was handled."""
        self._mean_s += _WEIGHT * (seconds - self._mean_s)

    async def turn(self) -> None:
        """Wait until a message may be read."""
        now_s = self._clock()
        if not self._waiting and self._is_free(now_s):
            self._charge(now_s)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._arm(now_s)
        await turn

    def _is_free(self, now_s: float) -> bool:
        return self._free_s <= now_s + self._slack_s

    def _charge(self, now_s: float) -> None:
        self._free_s = max(self._free_s, now_s) + (self._mean_s + _READ_S) / self._share

    def _arm(self, now_s: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, self._free_s - now_s), self._wake)

    def _wake(self) -> None:
        self._timer, now_s = None, self._clock()
        while self._waiting and self._is_free(now_s):
            turn = self._waiting.popleft()
            if not turn.done():  # its stream may have ended
                self._charge(now_s)
                turn.set_result(None)
        if self._waiting:
            self._arm(now_s)
