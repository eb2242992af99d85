"""Work that nobody needs to wait for when the process ends: compiling, which takes up to a minute.

Threads of executors are joined when the event loop and the interpreter end: SIGTERM would wait for the compiler.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Never, TypeVar

T = TypeVar("T")
_working = set[threading.Thread]()


async def in_daemon_thread(work: Callable[[], T], *, name: str) -> T:
    """What ``work`` returns; a thread of its own does it, to the end, unless the process ends before."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(outcome: Callable[[Any], None], value: Any) -> None:
        if not done.done():  # whoever waited may have been cancelled
            outcome(value)

    def run() -> None:
        try:
            found: tuple[Callable[[Any], None], Any] = done.set_result, work()
        except Exception as error:
            found = done.set_exception, error
        finally:
            _working.discard(threading.current_thread())
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell, *found)

    thread = threading.Thread(target=run, name=name, daemon=True)
    _working.add(thread)
    thread.start()
    return await done


def exit_process(code: int) -> Never:
    """Ends the process as `sys.exit` does; at once where such work is under way.

    The interpreter would tear down under a compiler that still runs, and crash now and then.
    """
    if not _working:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
