"""The store: everything that must outlive the process, one durable transaction at a time."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import sqlalchemy as sa

from hetis.planner.failures import ServiceError
from hetis.planner.store import leadership, migrating, opening
from hetis.planner.store.errors import StoreError
from hetis.planner.store.file_lock import FileLock
from hetis.planner.store.transactions import Reader, Transaction

T = TypeVar("T")
LEASE_S = 10.0
_MIGRATION_LOCK = 0x6865746973  # of PostgreSQL's advisory locks: "hetis"


class Store:
    """Records in SQLite or PostgreSQL. One thread does all the work, so that writes are one after another.

    A write is durable when `write` returns: SQLite has synced it to disk, PostgreSQL has committed it. Work that a
    caller no longer waits for (a cancelled call) is done all the same once it has begun.
    """

    def __init__(self, url: sa.URL, *, lease_s: float, clock: Callable[[], float]) -> None:
        self._label = opening.label_of(url)
        self._engine = opening.make_engine(url)
        self._readers = opening.reading(self._engine)
        file = opening.file_of(url)
        self._lock = FileLock(file) if file else None
        self._lease_s = lease_s if url.drivername != "sqlite" else 0.0
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hetis-store")
        self._epoch: int | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._replaced = asyncio.Event()

    @classmethod
    async def open(cls, url: str, *, lease_s: float = LEASE_S, clock: Callable[[], float] = time.time) -> Store:
        """A store whose tables have the newest form.

        Args:
            url: ``sqlite:///FILE`` or ``postgresql://...``.
            lease_s: how long a planner on PostgreSQL leads without renewing; it renews three times as often.
            clock: Unix time, for what is forgotten after a while.

        Raises:
            StoreError: it cannot be used; nothing was changed.
        """
        store = cls(opening.parse_url(url), lease_s=lease_s, clock=clock)
        try:
            await store._run(store._open)
        except BaseException:
            await store.close()
            raise
        return store

    @property
    def epoch(self) -> int | None:
        """Of the term that `lead` took. None: it was not called."""
        return self._epoch

    async def lead(self, holder: str) -> int:
        """Takes leadership and returns its epoch, which is above all before; durably.

        Args:
            holder: who this is, for people.

        Raises:
            ServiceError: NOT_LEADER: another planner holds the file's lock or the server's lease.
        """
        self._epoch = await self._run(self._lead, holder)
        if self._lease_s and self._renewal is None:
            self._renewal = asyncio.create_task(self._renew_for_ever(), name="renewal of leadership")
        return self._epoch

    async def until_replaced(self) -> None:
        """Returns when another planner has taken over; this one can then change nothing, and should end."""
        await self._replaced.wait()

    async def read(self, work: Callable[[Reader], T]) -> T:
        """What ``work`` returns; it runs in the store's thread and sees one consistent state.

        Raises:
            ServiceError: STORE_UNAVAILABLE, or what ``work`` raises.
        """
        return await self._run(self._read, work)

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """What ``work`` returns, in the store's thread, once all its changes are durable; if it raises none is made.

        Raises:
            ServiceError: NOT_LEADER or STORE_UNAVAILABLE, or what ``work`` raises.
        """
        try:
            return await self._run(self._write, work)
        except ServiceError as error:
            self._note_replacement(error)
            raise

    async def close(self) -> None:
        """Lets another planner take over, and closes. Further calls do nothing."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)
            self._renewal = None
        try:
            await self._run(self._close)
        except RuntimeError:  # closed before
            return
        self._thread.shutdown()

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _note_replacement(self, error: ServiceError) -> None:
        if self._epoch is not None and error.reason_name == "NOT_LEADER":
            self._replaced.set()

    async def _renew_for_ever(self) -> None:
        assert self._epoch is not None
        while not self._replaced.is_set():
            await asyncio.sleep(self._lease_s / 3)
            try:
                await self._run(self._renew)
            except ServiceError as error:  # a server that is away may come back before anybody else leads
                self._note_replacement(error)

    # In the store's thread from here on.

    def _open(self) -> None:
        try:
            with self._readers.begin() as connection:
                if self._lock is not None:
                    opening.check_file(connection, self._label)
                old = migrating.needs_migration(connection, self._label)
            if self._lock is not None:
                opening.use_write_ahead_log(self._engine)
            if old:
                self._migrate()
        except sa.exc.DBAPIError as error:
            raise opening.cannot_open(error, self._label) from None
        except sqlite3.Error as error:
            raise StoreError(f"store {self._label} cannot be written: {error}") from None

    def _migrate(self) -> None:
        if self._lock is not None and not self._lock.take():
            raise StoreError(f"store {self._label} is in use by another planner, and older than this one; stop that")
        try:
            with self._engine.begin() as connection:
                if connection.dialect.name == "postgresql":
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
                if migrating.needs_migration(connection, self._label):  # nobody was faster
                    migrating.migrate(connection)
        finally:
            if self._lock is not None:
                self._lock.release()

    def _lead(self, holder: str) -> int:
        if self._lock is not None and not self._lock.take():
            with self._readers.begin() as connection:
                raise leadership.not_leader(leadership.holder_of(connection), store=self._label)
        try:
            with self._engine.begin() as connection:
                return leadership.take(connection, holder, store=self._label, lease_s=self._lease_s)
        except sa.exc.DBAPIError as error:
            raise self._trouble(error) from None

    def _renew(self) -> None:
        assert self._epoch is not None
        try:
            with self._engine.begin() as connection:
                leadership.renew(connection, self._epoch, lease_s=self._lease_s)
        except sa.exc.DBAPIError as error:
            raise self._trouble(error) from None

    def _read(self, work: Callable[[Reader], T]) -> T:
        try:
            with self._readers.begin() as connection:
                return work(Reader(connection))
        except sa.exc.DBAPIError as error:
            raise self._trouble(error) from None

    def _write(self, work: Callable[[Transaction], T]) -> T:
        if self._epoch is None:
            raise leadership.not_leader("")
        try:
            with self._engine.begin() as connection:
                leadership.check(connection, self._epoch)
                return work(Transaction(connection, now_s=self._clock()))
        except sa.exc.DBAPIError as error:
            raise self._trouble(error) from None

    def _trouble(self, error: sa.exc.DBAPIError) -> Exception:
        return error if opening.is_a_bug(error) else opening.unavailable(error, self._label)

    def _close(self) -> None:
        try:
            if self._epoch is not None and self._lease_s:
                with self._engine.begin() as connection:
                    leadership.release(connection, self._epoch)
        except sa.exc.DBAPIError:
            pass  # the lease ends by itself
        finally:
            self._engine.dispose()
            if self._lock is not None:
                self._lock.release()
