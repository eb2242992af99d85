"""One connection to the store, and the thread that uses it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event

import hetis.planner.store.opening as opening
from hetis.planner.failures import Reason, ServiceError

T = TypeVar("T")


class Breaker:
    """Breaks the connection of an engine from outside the thread that waits for it.

    No system timeout notices a server behind a proxy that still acknowledges bytes but forwards none: the thread that
    waits for an answer would wait for ever. The engine has at most one connection.
    """

    def __init__(self, engine: sa.Engine, clock: Callable[[], float]) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._clock = clock
        self._moved_s = clock()
        if engine.dialect.name == "postgresql":
            for name in ("before_cursor_execute", "after_cursor_execute", "begin", "commit"):
                event.listen(engine, name, self._moved)
            # Inserted first, since SQLAlchemy's own queries on a new connection may hang, too.
            event.listen(engine, "connect", self._connected, insert=True)
            event.listen(engine, "close", self._closed)

    @property
    def silent_s(self) -> float:
        """Seconds since a transaction last began a statement or received its answer."""
        return self._clock() - self._moved_s

    def break_connection(self) -> None:
        """Break the connection: a waiting thread gets an error, and the next transaction makes a new connection."""
        with self._lock:
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def _moved(self, *_: object) -> None:
        self._moved_s = self._clock()

    def close(self) -> None:
        with self._lock:
            self._forget()

    def _connected(self, connection: Any, _: object) -> None:
        with self._lock:
            self._forget()  # a connection that failed before it was used
            # A descriptor of our own: the driver's number may refer to another file by the time it is used.
            self._socket = socket.socket(fileno=os.dup(connection.fileno()))

    def _closed(self, _connection: object, _: object) -> None:
        self.close()

    def _forget(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class StoreConnection:
    """The only connection of an engine, with the only thread that uses it, so that its transactions are serialised.

    Work that has begun is finished even if its caller no longer waits (a cancelled call).

    Args:
        url: the store's URL as `opening.parse_url` returns it.
        thread: the prefix of the thread's name.
        lease_s: the lease, from which a server's timeouts are derived.
        machine: monotonic seconds.
        pings: see `opening.make_engine`.
    """

    def __init__(
        self, url: sa.URL, *, thread: str, lease_s: float, machine: Callable[[], float], pings: bool = True
    ) -> None:
        self.label = opening.label_of(url)
        self.engine = opening.make_engine(url, lease_s=lease_s, pings=pings)
        self.readers = opening.reading_one_state(self.engine)
        self.statements = opening.at_once(self.engine)
        self.looks = opening.reading(self.statements)
        self.breaker = Breaker(self.engine, machine)
        self._machine_s = machine
        self._began_s: float | None = None  # when the present work of the thread began
        self.file = opening.file_of(url)  # None on a server
        self._opened: tuple[int, int] | None = None  # identity of the file that was opened
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=thread)

    @property
    def is_at_its_place(self) -> bool:
        """Whether the file that was opened is still there under its name; a server always is."""
        return self.file is None or opening.identity_of(self.file) == self._opened

    def note_file(self) -> None:
        """Note the file that is there now as the one that was opened."""
        if self.file is not None:
            self._opened = opening.identity_of(self.file)

    @property
    def hanging_s(self) -> float:
        """How long the thread has waited for the store's next answer; 0 if it does no work."""
        began_s = self._began_s
        return 0.0 if began_s is None else min(self._machine_s() - began_s, self.breaker.silent_s)

    def run(self, work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Run ``work`` in the thread; nobody needs to wait for its result."""
        working = asyncio.get_running_loop().run_in_executor(self._thread, self._do, work, *arguments)
        working.add_done_callback(forget)
        return working

    def _do(self, work: Callable[..., T], *arguments: object) -> T:
        self._began_s = self._machine_s()
        try:
            return work(*arguments)
        finally:
            self._began_s = None

    async def run_in_time(self, limit_s: float, work: Callable[..., T], *arguments: object) -> T:
        """Run ``work`` in the thread and return its result; on a server, break the connection after ``limit_s``.

        Raises:
            ServiceError: what ``work`` raises; STORE_UNAVAILABLE after ``limit_s``.
        """
        working = self.run(work, *arguments)
        if self.file is not None:
            return await working
        try:
            done, _ = await asyncio.wait({working}, timeout=max(limit_s, 0.0))
        finally:
            working.cancel()  # drops work not yet begun, which nobody wants any more
        if not done:
            self.breaker.break_connection()
            message = f"the planner's store {self.label} did not answer for {limit_s:.1f} s"
            raise ServiceError(Reason.ERROR_REASON_STORE_UNAVAILABLE, message, metadata={"changed": "unknown"})
        return working.result()

    @contextlib.contextmanager
    def begun(self, engine: sa.Engine) -> Iterator[sa.Connection]:
        """Begin a transaction of one of the engines, in which problems of the store are raised as STORE_UNAVAILABLE."""
        # SQLite would write on to a file that was removed: what it acknowledged would be gone with the process.
        if not self.is_at_its_place:
            raise opening.moved(self.label)
        changes = not opening.is_reading(engine)
        is_committing = changes and engine.get_execution_options().get("isolation_level") == "AUTOCOMMIT"  # each time
        try:
            with engine.begin() as connection:
                yield connection
                is_committing = changes
        except sa.exc.DBAPIError as error:
            if opening.is_a_bug(error):
                raise
            raise opening.unavailable(error, self.label, is_committing=is_committing) from None

    def close(self) -> None:
        """Close the connection, in the thread."""
        self.engine.dispose()
        self.breaker.close()

    def end_thread(self) -> None:
        self._thread.shutdown(wait=False)


def forget(task: asyncio.Future[Any]) -> None:
    """Retrieve the exception of a task whose caller no longer waits, so that asyncio does not log it."""
    if not task.cancelled():
        task.exception()
