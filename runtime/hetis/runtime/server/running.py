"""The life of the server: it listens, answers, and drains when it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from hetis.runtime.server.desk import Desk

_log = logging.getLogger(__name__)
_LAST_WORDS_S = 5  # for answers that were cut off to be written


class _Server(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Told:
    """Whether the server was told to end, and whether to hurry; to be used in its event loop."""

    def __init__(self) -> None:
        self.once, self.twice = asyncio.Event(), asyncio.Event()

    def hear(self) -> None:
        """Told once: drain. Told again: end at once."""
        (self.twice if self.once.is_set() else self.once).set()

    @contextlib.contextmanager
    def by_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT tell it; afterwards they do what they did before."""
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            loop.add_signal_handler(number, self.hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)


@contextlib.asynccontextmanager
async def answering(app: ASGIApp, listening: socket.socket) -> AsyncIterator[asyncio.Task[None]]:
    """Answers HTTP with ``app`` until the end of the context; the task ends before only if the server fails."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_LAST_WORDS_S,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.005)  # uvicorn tells by a flag
    try:
        yield serving
    finally:
        server.should_exit = True
        await serving


async def serve(
    desk: Desk,
    serving: asyncio.Task[None],
    told: Told,
    *,
    drain_s: float,
    ready: Callable[[], None] = lambda: None,
    beside: contextlib.AbstractAsyncContextManager[None] | None = None,
) -> bool:
    """Starts the desk and lets it serve until told to end, then drains; returns False where the engine failed.

    While it drains nothing new is taken (503, ``/health`` too), and what is open is answered for at most ``drain_s``,
    or until it is told again. Whatever is open then is answered with an error. ``serving`` is the HTTP server, as of
    `answering`; ``beside`` is entered while it serves.
    """
    desk.start()
    async with beside or contextlib.nullcontext():
        ready()
        await _first(told.once.wait(), desk.failed.wait(), asyncio.shield(serving))
    if told.once.is_set():
        _log.info("draining: %d open requests", desk.open_requests)
        await _first(desk.drain(drain_s), told.twice.wait(), desk.failed.wait())
        for _ in range(desk.open_requests):
            desk.metrics.cancelled("drain")
    has_failed = desk.failed.is_set()
    await desk.stop()
    return not has_failed


async def _first(*waits: Awaitable[object]) -> None:
    """Until one of them is through; the others are given up."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
