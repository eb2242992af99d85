"""One open stream: messages to be written to it, until it ends or another stream of its node takes over."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable

from hetis.planner.failures import Reason, ServiceError
from hetis.v1 import agent_service_pb2

Response = agent_service_pb2.ConnectNodeResponse
MOST_MESSAGES = 1000  # not yet taken by the agent
MOST_BYTES = 64 * 2**20


class Stream:
    """Messages for one agent, in order. Belongs to one event loop.

    Attributes:
        closed: set by whoever writes the messages, when all are written or the agent is gone.
    """

    def __init__(self, session: str) -> None:
        self.session = session
        self.closed = asyncio.Event()
        self._queue: deque[Response] = deque()
        self._num_bytes = 0
        self._has_news = asyncio.Event()
        self._has_ended = False
        self._error: ServiceError | None = None

    def send(self, messages: Iterable[Response]) -> bool:
        """Queue messages; return False if the agent is too slow, in which case the stream ends without them."""
        if self._has_ended:
            return True
        for message in messages:
            self._queue.append(message)
            self._num_bytes += message.ByteSize()
        if len(self._queue) > MOST_MESSAGES or self._num_bytes > MOST_BYTES:
            self._queue.clear()
            self.end(ServiceError(Reason.ERROR_REASON_PROTOCOL_VIOLATION, "the agent does not take what it is sent"))
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
            ServiceError: the error with which the stream was ended.
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
            raise self._error
