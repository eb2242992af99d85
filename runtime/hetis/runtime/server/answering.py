"""How the answers of a call reach its client, whole or in chunks, and what happens when it leaves or does not read."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from hetis.runtime.server.call import Call
from hetis.runtime.server.errors import ApiError
from hetis.runtime.server.metrics import ServerMetrics

_log = logging.getLogger(__name__)


def error_response(metrics: ServerMetrics, error: ApiError) -> Response:
    """An error of OpenAI's form, counted."""
    metrics.refused(error.status)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


class Answer(Response):
    """Sends what a call brings, whole or in chunks; when the client leaves, the call ends."""

    def __init__(self, metrics: ServerMetrics, call: Call, *, streams: bool, with_usage: bool, write_s: float) -> None:
        """``write_s``: seconds for the reader to take one chunk."""
        self._metrics, self._call = metrics, call
        self._streams, self._with_usage, self._write_s = streams, with_usage, write_s
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.ensure_future((self._stream if self._streams else self._whole)(scope, receive, send))
        leaving = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self._metrics.cancelled("disconnected")
            else:
                answering.result()
        finally:
            self._call.close()
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response: Response = JSONResponse(await self._call.whole())
        except ApiError as error:
            response = error_response(self._metrics, error)
        await response(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = EventStream(send, write_s=self._write_s, cancelled=self._metrics.cancelled)
        try:
            async for event in self._call.events(with_usage=self._with_usage):
                await stream.event(event)
            await stream.end()
        except ApiError as error:
            response = error_response(self._metrics, error)
            if not stream.has_begun:
                await response(scope, receive, send)
                return
            await stream.event(error.body())
            await stream.end()
        except TimeoutError:
            _log.info("a reader took nothing for %g s and was cut off", self._write_s)


async def until_gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """Server-sent events for one call; a reader that does not read is cut off, and holds up nobody meanwhile."""

    def __init__(self, send: Send, *, write_s: float, cancelled: Callable[[str], None]) -> None:
        self._send, self._write_s, self._cancelled = send, write_s, cancelled
        self._begun = False

    @property
    def has_begun(self) -> bool:
        return self._begun

    async def event(self, data: Any) -> None:
        """Sends one event. Raises TimeoutError: the reader does not take it."""
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        await self._write(f"data: {text}\n\n".encode(), more=True)

    async def end(self) -> None:
        await self._write(b"data: [DONE]\n\n", more=False)

    async def _write(self, body: bytes, *, more: bool) -> None:
        try:
            async with asyncio.timeout(self._write_s):
                if not self._begun:
                    self._begun = True
                    headers = [
                        (b"content-type", b"text/event-stream; charset=utf-8"),
                        (b"cache-control", b"no-cache"),
                        (b"x-accel-buffering", b"no"),
                    ]
                    await self._send({"type": "http.response.start", "status": 200, "headers": headers})
                await self._send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            self._cancelled("slow_reader")
            raise
