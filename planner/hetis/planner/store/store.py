"""The store: everything that must outlive the process, changed by one durable transaction at a time."""

from __future__ import annotations

import asyncio
import contextvars
import sqlite3
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import sqlalchemy as sa

import hetis.planner.store.lease as rows
import hetis.planner.store.opening as opening
import hetis.planner.store.schema as schema
from hetis.planner.callers import Turns
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.store.connection import StoreConnection, forget
from hetis.planner.store.health import StoreHealth
from hetis.planner.store.leadership import Leadership, end_task
from hetis.planner.store.lease import FileLock, machine_s
from hetis.planner.store.opening import StoreError
from hetis.planner.store.tables import R, Reader, RecordKind, Transaction


class _OlderLeaderError(StoreError):
    """An older planner leads with tables that this one would have to migrate; its lease lasts ``left_s`` more."""

    def __init__(self, message: str, *, left_s: float) -> None:
        super().__init__(message)
        self.left_s = left_s


T = TypeVar("T")
LEASE_S = 5.0  # the lease of a planner on a server
_LEAST_LIMIT_S = 5.0  # least limit on a server's answer to one statement
_READS_OF_A_CALLER = 4  # in the queue of reads at once: others' reads wait for no more of them
_TRY_S = 1.0  # least time that a read waits, whatever the state of the store
_PROBE_S = 2.0  # a store without a query for so long is probed
_TRIAL = "trial"  # the name of what is written to learn whether writes work; no record has such a name
_MIGRATION_S = 600.0  # time limit for one statement of a migration, and for waiting until another planner has migrated


class Store:
    """Records in SQLite or PostgreSQL. One thread makes all changes, so writes are serialised.

    On a server reads have a connection and a thread of their own, so that none waits for the disk behind a write. A
    read that begins once a write has returned sees it, since what is committed is in every later snapshot.

    A write is durable when `write` returns: SQLite has synced it to disk, PostgreSQL has committed it. Once begun, work
    is finished even if its caller no longer waits (a cancelled call). Each write is fenced: it needs the epoch that
    `leadership` has, and changes nothing once another planner has taken a term.
    """

    def __init__(
        self, url: sa.URL, *, lease_s: float, clock: Callable[[], float], machine: Callable[[], float]
    ) -> None:
        self._connection = StoreConnection(url, thread="hetis-store", lease_s=lease_s, machine=machine)
        self._label = self._connection.label
        self._is_served = self._connection.file is None
        self._limit_s = max(lease_s, _LEAST_LIMIT_S)  # limit on a server's answer to one statement
        self.clock = clock  # Unix time of what is stored
        self._machine_s = machine
        self.health = StoreHealth(machine)
        # A file has one connection for everything: a second one would wait for the locks of the first.
        leading = self._reading = self._connection
        if self._is_served:
            leading = StoreConnection(url, thread="hetis-lease", lease_s=lease_s / 2, machine=machine, pings=False)
            self._reading = StoreConnection(url, thread="hetis-store-reads", lease_s=lease_s, machine=machine)
        self._connections = dict.fromkeys((self._connection, self._reading))  # for records, without the lease's
        self.leadership = Leadership(
            leading,
            lease_s=lease_s if self._is_served else 0.0,
            limit_s=self._limit_s,
            machine=machine,
            on_expiry=self._connection.breaker.break_connection,
            on_end=self.health.writes_work,  # as far as is known: a standby writes nothing
        )
        self._turns = Turns(_READS_OF_A_CALLER)
        self._guard: asyncio.Task[None] | None = None  # watches over the connections while the store is open
        self._is_closed = False
        self._is_migrating = False

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.time,
        machine: Callable[[], float] = machine_s,
    ) -> Store:
        """Open a store and migrate its tables to the newest schema.

        Args:
            url: ``sqlite:///FILE`` or ``postgresql://...``.
            lease_s: how long a planner on PostgreSQL leads without a renewal; it renews six times per lease.
            clock: Unix time, by which old requests are forgotten.
            machine: monotonic seconds, for the lease.

        Raises:
            StoreError: the store cannot be used; nothing was changed.
        """
        store = cls(opening.parse_url(url), lease_s=lease_s, clock=clock, machine=machine)
        try:
            await store._open_after_older_ones()
        except BaseException:
            for connection in store._connections:
                connection.breaker.break_connection()  # otherwise closing would wait for whatever hangs
            await store.close()
            raise
        store._guard = asyncio.create_task(store._watch_over(), name="the store's guard")
        return store

    async def until_failed(self) -> None:
        """Wait until the store is closed; raise the error that ended the guard of its connections."""
        guard = self._guard
        if guard is not None:
            await asyncio.wait({guard})
            if not guard.cancelled():
                guard.result()

    async def read(self, work: Callable[[Reader], T]) -> T:
        """Run ``work`` on one consistent state in the thread of reads and return its result.

        A read does not queue behind a server that does not answer: it fails, so that the caller may try another
        planner. Raises STORE_UNAVAILABLE, or what ``work`` raises.
        """
        return await self._read_in(self._reading.readers, work)

    async def get(self, kind: RecordKind[R], name: str) -> R | None:
        """Return a record by one statement, which is one round trip to a server. Raises STORE_UNAVAILABLE."""
        return await self._read_in(self._reading.looks, lambda reader: kind.of(reader).get(name))

    async def require(self, kind: RecordKind[R], name: str) -> R:
        """Return a record as `get` does. Raises NOT_FOUND if there is none."""
        return await self._read_in(self._reading.looks, lambda reader: kind.of(reader).require(name))

    async def _read_in(self, engine: sa.Engine, work: Callable[[Reader], T]) -> T:
        reading: asyncio.Task[T] = _started(self._read_in_turn(engine, work))
        try:
            if self._is_served and not await self._ends_in_time(reading):
                message = f"the planner's store {self._label} has not answered for {self.health.answered_s_ago:.1f} s"
                raise ServiceError(Reason.ERROR_REASON_STORE_UNAVAILABLE, message, metadata={"changed": "no"})
            return await reading
        finally:
            reading.cancel()  # of a caller that has gone, it needs no turn

    async def _read_in_turn(self, engine: sa.Engine, work: Callable[[Reader], T]) -> T:
        async with self._turns.turn():
            return await self._reading.run(self._timed, self._read, engine, work)

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Run ``work`` in the store's thread and return its result once its changes are durable.

        If it raises, no change is made, unless ``changed: unknown`` says otherwise. Raises NOT_LEADER or
        STORE_UNAVAILABLE, or what ``work`` raises.
        """
        # The context contains the caller, for work that writes to the audit log.
        context = contextvars.copy_context()
        return await self.leadership.fenced(lambda: self._connection.run(context.run, self._timed, self._write, work))

    async def close(self) -> None:
        """Allow another planner to take over, and close the store. Further calls do nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        await end_task(self._guard)
        self._guard = None
        await self.leadership.close()
        closing = {connection.run(connection.close): connection for connection in self._connections}
        _, pending = await asyncio.wait(closing, timeout=self._limit_s)
        for late in pending:
            closing[late].breaker.break_connection()
        for connection in self._connections:
            connection.end_thread()

    async def _ends_in_time(self, reading: asyncio.Future[T]) -> bool:
        """Wait for a read while the store still answers any query, and return whether the read ended."""
        wait_s = _TRY_S
        while wait_s > 0:
            done, _ = await asyncio.wait({reading}, timeout=wait_s)
            if done:
                return True
            wait_s = self._limit_s - max(self._reading.hanging_s, self.health.failing_s)
        return False

    # --- The guard

    async def _watch_over(self) -> None:
        """Break a connection that has gone silent, probe a store that was not queried for a while, keep its lock."""
        running = dict[str, asyncio.Future[Any]]()
        tried_s = 0.0

        def is_idle(task: str) -> bool:
            return task not in running or running[task].done()

        leadership = self.leadership
        try:
            while True:
                await asyncio.sleep(min(_PROBE_S, self._limit_s) / 4)
                for connection in self._connections if self._is_served else ():
                    if connection.hanging_s > self._limit_s:
                        connection.breaker.break_connection()
                if self.health.answered_s_ago > _PROBE_S and is_idle("probe"):
                    running["probe"] = _started(self._probe())
                is_due = leadership.epoch is not None and self._machine_s() - tried_s > _PROBE_S
                if is_due and self.health.is_unwritable and is_idle("trial"):
                    tried_s = self._machine_s()
                    running["trial"] = self._connection.run(self._timed, self._try_to_write)
                if leadership.has_lost_lock and is_idle("lock"):
                    running["lock"] = _started(leadership.lock_again())
        finally:
            for task in running.values():
                task.cancel()

    async def _probe(self) -> None:
        epoch = self.leadership.epoch
        lease, _, _ = await self._connection.run(self._timed, self.leadership.look, self._connection)
        self.leadership.found(lease, epoch)

    # --- Opening

    async def _open_after_older_ones(self) -> None:
        """Open the store; wait for the lease of an older planner, which may have been killed, to expire once."""
        try:
            await self._open_in_time()
        except _OlderLeaderError as error:
            await asyncio.sleep(min(error.left_s, self._limit_s))
            await self._open_in_time()

    async def _open_in_time(self) -> None:
        """Wait for as long as the server answers anything, since a migration may take its time."""
        working = self._connection.run(self._open)
        while True:
            done, _ = await asyncio.wait({working}, timeout=self._limit_s / 4)
            if done:
                return working.result()
            limit_s = _MIGRATION_S if self._is_migrating else self._limit_s
            if self._is_served and self._connection.breaker.silent_s > limit_s:
                raise StoreError(f"store {self._label} cannot be reached: no answer for {limit_s:.1f} s")

    # --- In the store's thread from here on

    def _open(self) -> None:
        file = self._connection.file
        if file is not None:
            opening.make_private(file)
        try:
            with self._connection.readers.begin() as connection:
                if file is not None:
                    opening.check_file(connection, self._label)
                old = schema.needs_migration(connection, self._label)
            if file is not None:
                opening.keep_private(file)
                opening.use_write_ahead_log(self._connection.engine)
                self._connection.note_file()
            if old:
                self._migrate_alone()
        except sa.exc.DBAPIError as error:
            raise opening.cannot_open(error, self._label) from None
        except sqlite3.Error as error:
            raise StoreError(f"store {self._label} cannot be written: {error}") from None

    def _migrate_alone(self) -> None:
        lock = FileLock(self._connection.file) if self._connection.file is not None else None
        if lock is not None and not lock.take():
            raise StoreError(
                f"store {self._label} is in use by another planner and older than this one; stop the other planner"
            )
        self._is_migrating = True
        try:
            self._migrate()
        finally:
            self._is_migrating = False
            if lock is not None:
                lock.release()

    def _migrate(self) -> None:
        with self._connection.engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                schema.allow_pauses(connection)
                schema.lock_out_others(connection)
            if not schema.needs_migration(connection, self._label):
                return  # another planner has migrated it in the meantime
            is_new = schema.revision_of(connection) is None
            if not is_new:
                self._end_older_terms(connection)
            schema.migrate(connection)
            if is_new:
                rows.begin_at(connection, rows.epoch_at(self.clock()))

    def _end_older_terms(self, connection: sa.Connection) -> None:
        """End the terms of older planners, which would write to tables that they do not know.

        One that still leads is not interrupted: what it has promised its callers must stay as it is.
        """
        holder, left_s = rows.end_terms(connection)
        if left_s > 0:
            raise _OlderLeaderError(
                f"store {self._label} is in use by {holder.title}, which is older than this one; stop all"
                " older planners, then start this one",
                left_s=left_s,
            )

    def _read(self, engine: sa.Engine, work: Callable[[Reader], T]) -> T:
        with self._reading.begun(engine) as connection:
            return work(Reader(connection))

    def _write(self, work: Callable[[Transaction], T]) -> T:
        self.leadership.require_decision()  # the work may have waited long for its turn
        epoch = self.leadership.epoch
        if epoch is None:  # the term has ended since the check
            raise self.leadership.not_leader()
        try:
            return self._write_in(epoch, work)
        except ServiceError as error:
            if error.reason == Reason.ERROR_REASON_STORE_UNAVAILABLE and epoch == self.leadership.epoch:
                self.health.write_failed()
            raise

    def _write_in(self, epoch: int, work: Callable[[Transaction], T]) -> T:
        with self._connection.begun(self._connection.engine) as connection:
            rows.check(connection, epoch)
            return work(Transaction(connection, now_s=self.clock()))

    def _try_to_write(self) -> None:
        """Write something that leaves nothing, to learn whether writes work again."""

        def work(tx: Transaction) -> None:  # an update to the same value would not do: SQLite skips it
            tx.plan_documents.put(_TRIAL, b"")
            tx.plan_documents.delete(_TRIAL)

        if (epoch := self.leadership.epoch) is not None:
            self._write_in(epoch, work)  # if it fails, that is not news: only changes that fail count
            self.health.trial_worked()

    def _timed(self, work: Callable[..., T], *arguments: object) -> T:
        with self.health.counted():
            return work(*arguments)


def _started(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    task = asyncio.create_task(work)
    task.add_done_callback(forget)
    return task
