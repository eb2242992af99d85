"""What clients and operators are told while the server starts, which may take minutes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hetis.runtime.server.errors import StartingError

_log = logging.getLogger(__name__)
_SHORT_S = 1.0  # what took no longer is not worth a second line


class Starting:
    """What the start is at. Another thread may ask."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase: tuple[str, float] | None = None

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Says in the log, and to who asks, ``what`` is being done, and in the log how long it took."""
        begun_s = self._clock()
        self._phase = what, begun_s
        _log.info("starting: %s", what)
        yield
        taken_s = self._clock() - begun_s
        if taken_s >= _SHORT_S:
            _log.info("starting: %s took %.0f s", what.partition(",")[0], taken_s)

    @property
    def why(self) -> str:
        """What clients wait for."""
        if self._phase is None:
            return "the server is starting"
        what, begun_s = self._phase
        return f"the server is starting: {what} ({self._clock() - begun_s:.0f} s so far)"


class Door:
    """The server's app: 503 with the reason until there is one to go through to."""

    def __init__(self, starting: Starting) -> None:
        self._starting = starting
        self._app: ASGIApp | None = None

    def open(self, app: ASGIApp) -> None:
        """From now on ``app`` answers."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            error = StartingError(self._starting.why)
            is_probe = scope["path"] == "/health"
            body = {"status": "starting", "reason": str(error)} if is_probe else error.body()
            await JSONResponse(body, status_code=error.status, headers=error.headers())(scope, receive, send)
