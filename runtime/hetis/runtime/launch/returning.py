"""Lost workers that are there again are reached by threads of their own: one that keeps silent delays no step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from hetis.runtime.kv.errors import DeviceError
from hetis.runtime.transport.errors import ChannelError
from hetis.runtime.worker.remote import RemoteDevice

Reach = Callable[[], RemoteDevice | None]


class Returning:
    """One attempt at a time to reach each worker; asked by the engine's thread between two steps."""

    def __init__(self) -> None:
        self._attempts: dict[str, Future[RemoteDevice | None]] = {}

    @property
    def under_way(self) -> tuple[str, ...]:
        """Workers that are being reached, by name."""
        return tuple(name for name, attempt in self._attempts.items() if not attempt.done())

    def ask(self, name: str, reach: Reach) -> RemoteDevice | None:
        """The worker that an attempt has reached since the last time, or None; then another attempt has begun.

        ``reach`` is called in a thread; it returns None where there is no reason to try.

        Raises:
            ChannelError, DeviceError: the attempt failed.
        """
        attempt = self._attempts.get(name)
        if attempt is not None and not attempt.done():
            return None
        self._attempts.pop(name, None)
        found = None if attempt is None else attempt.result()
        if found is None:
            self._attempts[name] = _in_a_thread(name, reach)
        return found

    def close(self) -> None:
        """Who is reached from now on is let go at once."""
        for attempt in self._attempts.values():
            attempt.add_done_callback(_let_go)


def _in_a_thread(name: str, reach: Reach) -> Future[RemoteDevice | None]:
    done: Future[RemoteDevice | None] = Future()

    def run() -> None:
        try:
            done.set_result(reach())
        except BaseException as error:  # it is the engine's thread that is told
            done.set_exception(error)

    # Not of a pool: the process would wait for its threads at the end, and so for a worker that keeps silent.
    threading.Thread(target=run, name=f"reach {name}", daemon=True).start()
    return done


def _let_go(attempt: Future[RemoteDevice | None]) -> None:
    with suppress(ChannelError, DeviceError):
        found = attempt.result()
        if found is not None:
            found.close()
