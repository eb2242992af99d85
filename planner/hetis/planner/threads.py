"""Threads for work that would stall the event loop.

`run_in_thread_gc_paused` is for large documents and plans. Such work creates a million objects or more and hardly
any cycles, and collections would traverse them again and again, each time stopping the loop until it is done
(docs/operations.md, "Large documents"). `run_in_daemon_thread` is for work that need not be finished when the process
ends, such as compiling, which takes up to a minute: the threads of executors are joined when the event loop and the
interpreter end, so that SIGTERM would wait for the compiler.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Never, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
_LONGEST_PAUSE_S = 60.0  # if such work overlaps without end, collections resume after this time
_MOST_AT_A_TIME = 2  # the threads share one interpreter: more would not be faster, and each takes memory
_threads = ThreadPoolExecutor(_MOST_AT_A_TIME, thread_name_prefix="hetis-gc-paused")
_unwanted: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("unwanted", default=None)
_working = set[threading.Thread]()


async def run_in_thread_gc_paused(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Run ``work`` in a thread with garbage collection paused, and return its result.

    At most two run at a time; others wait. If the caller is cancelled, waiting work never starts, and running work ends
    when it next calls `stop_if_unwanted`.
    """
    unwanted = threading.Event()

    def with_gc_paused() -> T:
        stop_if_unwanted()
        with _gc_pause.held():
            return work(*arguments, **named)

    context = contextvars.copy_context()
    context.run(_unwanted.set, unwanted)
    try:
        return await asyncio.get_running_loop().run_in_executor(_threads, context.run, with_gc_paused)
    except asyncio.CancelledError:
        unwanted.set()
        raise


def stop_if_unwanted() -> None:
    """End the present work if its caller no longer waits for it.

    Raises:
        UnwantedError: the caller no longer waits.
    """
    unwanted = _unwanted.get()
    if unwanted is not None and unwanted.is_set():
        raise UnwantedError


class UnwantedError(Exception):
    """Raised in work whose caller no longer waits for it, and so never seen by any caller."""


class _GcPause:
    """A pause of this process's garbage collection that lasts as long as any thread holds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_holders = 0
        self._since_s = 0.0

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            self._num_holders += 1
            if self._num_holders == 1:
                self._since_s = time.monotonic()
                gc.disable()
            elif time.monotonic() - self._since_s > _LONGEST_PAUSE_S:
                gc.enable()
        try:
            yield
        finally:
            with self._lock:
                self._num_holders -= 1
                if not self._num_holders:
                    gc.enable()


_gc_pause = _GcPause()


async def run_in_daemon_thread(work: Callable[[], T], *, name: str) -> T:
    """Run ``work`` in a daemon thread of its own, and return its result."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(outcome: Callable[[Any], None], value: Any) -> None:
        if not done.done():  # the waiting caller may have been cancelled
            outcome(value)

    def run() -> None:
        try:
            found: tuple[Callable[[Any], None], Any] = done.set_result, work()
        except Exception as error:
            found = done.set_exception, error
        finally:
            _working.discard(threading.current_thread())
        with suppress(RuntimeError):  # the loop has ended in the meantime
            loop.call_soon_threadsafe(settle, *found)

    thread = threading.Thread(target=run, name=name, daemon=True)
    _working.add(thread)
    thread.start()
    return await done


def exit_process(code: int) -> Never:
    """End the process as `sys.exit` does, but at once while a daemon thread works.

    Otherwise the interpreter would shut down under a compiler that is still running, and occasionally crash.
    """
    if not _working:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
