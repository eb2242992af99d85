"""One open stream: what is to be written to it, until it ends or another one of its node takes over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from hetis.planner.failures import ServiceError
from hetis.v1 import agent_service_pb2

Response = agent_service_pb2.ConnectNodeResponse


class Stream:
    """Messages for one agent, in their order. Of one event loop."""

    def __init__(self, session: str) -> None:
        self.session = session
        self._queue: asyncio.Queue[Response | ServiceError | None] = asyncio.Queue()
        self._has_ended = False

    def send(self, messages: Iterable[Response]) -> None:
        if not self._has_ended:
            for message in messages:
                self._queue.put_nowait(message)

    def end(self, error: ServiceError | None = None) -> None:
        """After what was sent before. None: with OK, because the agent ended it."""
        if not self._has_ended:
            self._has_ended = True
            self._queue.put_nowait(error)

    async def messages(self) -> AsyncIterator[Response]:
        """
        Raises:
            ServiceError: that the stream was ended with.
        """
        while True:
            message = await self._queue.get()
            if message is None:
                return
            if isinstance(message, ServiceError):
                raise message
            yield message
