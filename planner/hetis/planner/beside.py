"""Work on large documents and plans beside the event loop: in a thread, and with the collector of garbage at rest.

Such work makes a million objects or more and hardly a cycle. Collections would walk them again and again, each in one
go in which the loop stands still (docs/planner.md, "Large documents").
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
_LONGEST_REST_S = 60.0  # where such work never ends because more comes all the time


async def beside_loop(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What ``work`` returns; it goes on where the caller is cancelled."""

    def at_rest() -> T:
        with _rest.taken():
            return work(*arguments, **named)

    return await asyncio.to_thread(at_rest)


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
