"""Streams of agents: what an agent has not taken yet, and the share of the event loop for what agents send."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager

from hetis.planner.failures import ServiceError
from hetis.planner.fleet.agents.deltas import protocol_violation
from hetis.v1 import agent_service_pb2

Response = agent_service_pb2.ConnectNodeResponse
MOST_MESSAGES = 1000  # messages that the agent has not taken yet
MOST_BYTES = 64 * 2**20
_READ_S = 0.0002  # what gRPC takes to read a message
_FIRST_S = 0.0002  # the time of a message before any was measured
_WEIGHT = 0.05  # of the last message in the mean time of one


class Stream:
    """The messages for one agent, in order. Belongs to one event loop."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.closed = asyncio.Event()  # set by the writer, once all messages are written or the agent is gone
        self._queue: deque[Response] = deque()
        self._num_bytes = 0
        self._has_more = asyncio.Event()
        self._has_ended = False
        self._error: ServiceError | None = None  # why the stream ended; None: in an orderly way

    def send(self, messages: Iterable[Response]) -> bool:
        """Queue messages; return False if the agent is too slow, in which case they are dropped and the stream ends."""
        if self._has_ended:
            return True
        for message in messages:
            self._queue.append(message)
            self._num_bytes += message.ByteSize()
        if len(self._queue) > MOST_MESSAGES or self._num_bytes > MOST_BYTES:
            self._queue.clear()
            self.end(protocol_violation("the agent does not read its messages fast enough"))
            return False
        self._has_more.set()
        return True

    def end(self, error: ServiceError | None = None) -> None:
        """End the stream after the queued messages, with OK if there is no error."""
        if not self._has_ended:
            self._has_ended, self._error = True, error
            self._has_more.set()

    async def messages(self) -> AsyncIterator[Response]:
        """Yield messages until the stream ends.

        Raises:
            ServiceError: the error that was passed to `end`.
        """
        while True:
            while self._queue:
                message = self._queue.popleft()
                self._num_bytes -= message.ByteSize()
                yield message
            if self._has_ended:
                break
            self._has_more.clear()
            await self._has_more.wait()
        if self._error is not None:
            raise self._error.with_traceback(None)  # which would grow with every stream of a lost term


class MessageBudget:
    """Gives streams their turns to read a message, in the order in which they request them.

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

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Note the time in which a message is handled."""
        began_s = self._clock()
        try:
            yield
        finally:
            self.took(self._clock() - began_s)

    def took(self, seconds: float) -> None:
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
