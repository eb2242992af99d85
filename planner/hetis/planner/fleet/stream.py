"""The planner's side of one agent's stream: the messages that it has not taken yet."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable

from hetis.planner.failures import ServiceError
from hetis.planner.fleet.deltas import protocol_violation
from hetis.v1 import agent_service_pb2

Response = agent_service_pb2.ConnectNodeResponse
MOST_MESSAGES = 1000  # messages that the agent has not taken yet
MOST_BYTES = 64 * 2**20


class Stream:
    """The messages for one agent, in order. Belongs to one event loop."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.closed = asyncio.Event()  # set by the writer, once all messages are written or the agent is gone
        self._queue: deque[Response] = deque()
        self._num_bytes = 0
        self._has_news = asyncio.Event()
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
        self._has_news.set()
        return True

    def end(self, error: ServiceError | None = None) -> None:
        """End the stream after the queued messages, with OK if there is no error."""
        if not self._has_ended:
            self._has_ended, self._error = True, error
            self._has_news.set()

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
            self._has_news.clear()
            await self._has_news.wait()
        if self._error is not None:
            raise self._error.with_traceback(None)  # which would grow with every stream of a lost term
