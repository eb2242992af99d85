"""Work on large documents and plans beside the event loop: in a thread, and with the collector of garbage at rest.

Such work makes a million objects or more and hardly a cycle. Collections would walk them again and again, each in one
go in which the loop stands still (docs/planner.md, "Large documents").
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
_LONGEST_REST_S = 60.0  # where such work never ends because more comes all the time
_MOST_AT_A_TIME = 2  # they share one interpreter: more would not be faster, and each takes memory
_threads = ThreadPoolExecutor(_MOST_AT_A_TIME, thread_name_prefix="hetis-beside-loop")
_unwanted: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("unwanted", default=None)


async def beside_loop(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What ``work`` returns.

    Two works at most run at a time, the others wait. Where the caller is cancelled, one that waits never begins, and
    one that runs ends when it next calls `stop_if_unwanted`.
    """
    unwanted = threading.Event()

    def at_rest() -> T:
        stop_if_unwanted()
        with _rest.taken():
            return work(*arguments, **named)

    context = contextvars.copy_context()
    context.run(_unwanted.set, unwanted)
    try:
        return await asyncio.get_running_loop().run_in_executor(_threads, context.run, at_rest)
    except asyncio.CancelledError:
        unwanted.set()
        raise


def stop_if_unwanted() -> None:
    """Ends the present work where its caller has gone.

    Raises:
        UnwantedError: it has.
    """
    unwanted = _unwanted.get()
    if unwanted is not None and unwanted.is_set():
        raise UnwantedError


class UnwantedError(Exception):
    """Nobody waits for the work any more, so that nobody ever sees this."""


class _Rest:
    """The collector rests while anybody wants it to; of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted_by = 0
        self._since_s = 0.0

    @contextmanager
    def taken(self) -> Iterator[None]:
        with self._lock:
            self._wanted_by += 1
            if self._wanted_by == 1:
                self._since_s = time.monotonic()
                gc.disable()
            elif time.monotonic() - self._since_s > _LONGEST_REST_S:
                gc.enable()
        try:
            yield
        finally:
            with self._lock:
                self._wanted_by -= 1
                if not self._wanted_by:
                    gc.enable()


_rest = _Rest()
