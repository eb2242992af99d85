"""The store: everything that must outlive the process, changed by one durable transaction at a time."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import math
import sqlite3
import time
from bisect import bisect_left
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import sqlalchemy as sa

import hetis.planner.store.leadership as leadership
import hetis.planner.store.opening as opening
import hetis.planner.store.schema as schema
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.store.leadership import FileLock, GrantedLease, Holder, Lease, RenewalWatch, machine_s
from hetis.planner.store.opening import StoreError
from hetis.planner.store.tables import Reader, Transaction

QUIET_S = 5.0  # writes work again once a trial does, and no change has failed for so long
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class StoreHealth:
    """Counters of transactions, written by the store's thread and read by any other thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._answered_s = clock()  # when the last transaction succeeded
        self._began_s: float | None = None  # when the present transaction began
        self._is_failing = False  # whether the last finished transaction failed
        self._unwritable_s: float | None = None  # when a write failed, with no write known to work since
        self._failed_s = -math.inf  # when a write last failed
        self.errors = 0  # number of failed transactions
        self.seconds = 0.0  # total duration of all transactions
        # Number of transactions by duration, up to that of each bucket in `BUCKETS_S`; the last is for longer ones
        self.buckets = [0] * (len(BUCKETS_S) + 1)

    @property
    def answered_s_ago(self) -> float:
        """Seconds since the last successful transaction."""
        return self._clock() - self._answered_s

    @property
    def running_s(self) -> float:
        """How long the present transaction has been running; 0 if there is none."""
        began_s = self._began_s
        return 0.0 if began_s is None else self._clock() - began_s

    @property
    def failing_s(self) -> float:
        """How long no transaction has succeeded; 0 if the last finished one did."""
        return self.answered_s_ago if self._is_failing else 0.0

    @property
    def unwritable_s(self) -> float:
        """How long ago a write failed, with no write known to work since; 0 if writes work."""
        since_s = self._unwritable_s
        return 0.0 if since_s is None else self._clock() - since_s

    @property
    def is_unwritable(self) -> bool:
        return self._unwritable_s is not None

    def write_failed(self) -> None:
        """Note a write that failed because of the store."""
        self._failed_s = self._clock()
        if self._unwritable_s is None:
            self._unwritable_s = self._failed_s

    def trial_worked(self) -> None:
        """Note that a trial was written. On an almost full disk it fits where changes do not, so they have to end."""
        if self._clock() - self._failed_s >= QUIET_S:
            self.writes_work()

    def writes_work(self) -> None:
        """Note that writes work, as far as is known."""
        self._unwritable_s = None

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a transaction as failed if it raises STORE_UNAVAILABLE."""
        self._began_s = began_s = self._clock()
        has_failed = False
        try:
            yield
        except ServiceError as error:
            has_failed = error.reason == Reason.ERROR_REASON_STORE_UNAVAILABLE
            raise
        finally:
            now_s, self._began_s = self._clock(), None
            self.seconds += now_s - began_s
            self.buckets[bisect_left(BUCKETS_S, now_s - began_s)] += 1
            self._is_failing = has_failed
            if has_failed:
                self.errors += 1
            else:
                self._answered_s = now_s


class _OlderLeaderError(StoreError):
    """An older planner leads with tables that this one would have to migrate; its lease lasts ``left_s`` more."""

    def __init__(self, message: str, *, left_s: float) -> None:
        super().__init__(message)
        self.left_s = left_s


T = TypeVar("T")
LEASE_S = 5.0  # the lease of a planner on a server
_RENEWALS = 6  # per lease; one attempt may take two such intervals
_LOOK_S = 0.5  # interval at which a standby checks who leads
_TRY_S = 1.0  # least time that a read waits, whatever the state of the store
_PROBE_S = 2.0  # a store without a query for so long is probed
_TRIAL = "trial"  # the name of what is written to learn whether writes work; no record has such a name
_MIGRATION_S = 600.0  # time limit for one statement of a migration, and for waiting until another planner has migrated
_log = logging.getLogger("hetis.planner.store")


class Store:
    """Records in SQLite or PostgreSQL. One thread does all the work, so writes are serialised.

    A write is durable when `write` returns: SQLite has synced it to disk, PostgreSQL has committed it. Once begun, work
    is finished even if its caller no longer waits (a cancelled call).

    Leadership on a server has a thread and a connection of its own. Whatever happens to either connection, the term
    ends when the lease expires by this machine's clock (`Lease`): from then on nothing is written or acknowledged.
    """

    def __init__(
        self, url: sa.URL, *, lease_s: float, clock: Callable[[], float], machine: Callable[[], float]
    ) -> None:
        self._label = opening.label_of(url)
        self._engine = opening.make_engine(url, lease_s=lease_s)
        self._readers = opening.reading_one_state(self._engine)
        self._breaker = opening.Breaker(self._engine, machine)
        file = opening.file_of(url)
        self._lock = FileLock(file) if file else None
        self._file: tuple[int, int] | None = None  # identity of the file that was opened; None on a server
        is_served = url.drivername != "sqlite"
        self._lease_s = lease_s if is_served else 0.0
        self._limit_s = max(lease_s, 5.0)  # limit on a server's answer to one statement
        self.clock = clock  # Unix time of what is stored
        self._machine_s = machine
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hetis-store")
        # A file has one connection for everything: a second one would wait for the locks of the first.
        self._lease_engine = (
            opening.make_engine(url, lease_s=lease_s / 2, asks_first=False) if is_served else self._engine
        )
        self._lease_statements = opening.at_once(self._lease_engine)
        self._lease_looks = opening.reading(self._lease_statements)
        self._lease_breaker = opening.Breaker(self._lease_engine, machine) if is_served else self._breaker
        self._lease_thread = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="hetis-lease") if is_served else self._thread
        )
        self._epoch: int | None = None
        self._renewal: asyncio.Task[None] | None = None  # renews the lease during a term on a server
        self._guard: asyncio.Task[None] | None = None  # watches over the connections while the store is open
        self._ended = asyncio.Event()  # set when the present term is over
        self.health = StoreHealth(machine)  # when and how quickly the store has answered
        self.lease = Lease(self._lease_s, machine)  # the lease of the present term
        self._leader: Holder | None = None  # the last leader seen, or the one that refused to be replaced
        self._leads_until_s = 0.0  # when the lease ends that another planner was last seen to hold, named or not
        self._name = ""  # this planner's text as a leader
        self._shown = ""  # what renewals write as the leader's text: that of this planner once its term has begun
        self._has_begun = False  # whether this planner leads, and not only holds a term
        self._led_s = machine()  # when this planner or another one was last known to lead
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
            store._breaker.break_connection()  # otherwise closing would wait for whatever hangs
            await store.close()
            raise
        store._guard = asyncio.create_task(store._watch_over(), name="the store's guard")
        return store

    @property
    def leader(self) -> Holder | None:
        """The other planner that leads, until its lease ends without having been seen renewed. None if unknown."""
        return self._leader if self._is_led else None

    @property
    def _is_led(self) -> bool:
        return self._machine_s() < self._leads_until_s

    @property
    def led_s_ago(self) -> float:
        """Seconds since any planner was last seen to lead, in a term that it had begun.

        They grow if a standby cannot take over, and also if planners take turns at terms that none of them can begin.
        """
        return self._machine_s() - self._led_s

    @property
    def epoch(self) -> int | None:
        """The epoch of the present term, or None if this planner does not lead."""
        return self._epoch

    async def lead(self, holder: str, addresses: Sequence[str] = (), *, abandoned: GrantedLease | None = None) -> int:
        """Take leadership durably and return its epoch, which is above all earlier ones; then begin, and `announce`.

        Args:
            holder: this planner's name, for display.
            abandoned: a lease that may be ended before it expires, if it has not been renewed by now.

        Raises:
            ServiceError: NOT_LEADER if another planner holds the file's lock or the server's lease; STORE_UNAVAILABLE.
            StoreError: the tables were migrated to another version since this planner opened the store.
        """
        await _end(self._renewal)
        self._name = Holder(name=holder.replace(" ", "_"), addresses=tuple(addresses)).to_text()
        self._shown, self._has_begun = "", False
        try:
            asked_s, epoch = await self._limited(self._lead, abandoned)
        except ServiceError as error:
            self._note_leader(error)
            raise
        self._epoch = epoch
        self._note_lease("", 0.0)
        self._ended = asyncio.Event()
        self.lease.grant(asked_s)
        if self._lease_s:
            self._renewal = asyncio.create_task(self._renew_for_ever(epoch), name="renewal of leadership")
        return epoch

    async def announce(self) -> None:
        """Announce durably that the term has begun: from now on this planner is what others call the leader.

        Raises NOT_LEADER if the term is over, or STORE_UNAVAILABLE.
        """
        epoch = self._epoch
        if epoch is None:
            raise self.not_leader()
        self._shown = self._name  # before the request, which a renewal must not undo
        await self._limited(self._renew, epoch)
        if self._epoch == epoch:
            self._has_begun, self._led_s = True, self._machine_s()

    async def stand_by(self, holder: str, addresses: Sequence[str] = ()) -> int:
        """Wait until no planner leads, then lead and return the epoch. In the meantime `leader` names the leader.

        It does not wait for the end of a lease that nobody renews (`RenewalWatch`). If this planner holds a term that
        it failed to begin, that term is ended first, and other planners get the first chance.

        Raises StoreError if a planner of another version migrates the tables meanwhile.
        """
        await _end(self._renewal)
        epoch, watch = self._epoch, RenewalWatch(self._lease_s, self._machine_s)
        if epoch is not None:
            self._end_term()
            with contextlib.suppress(ServiceError):
                await self._limited(self._give_up, epoch)
            await asyncio.sleep(1.5 * _LOOK_S)  # long enough for every standby to look
        while True:
            wait_s = _LOOK_S
            try:
                lease, left_s = await self._limited(self._look)
                if left_s <= 0:
                    return await self.lead(holder, addresses)
                if watch.is_abandoned(lease):
                    _log.warning(
                        "the lease has not expired, but nobody renews it: the store's clock may have stepped back",
                        extra={"leader": Holder.from_text(lease.holder).name, "left_s": round(left_s, 3)},
                    )
                    return await self.lead(holder, addresses, abandoned=lease)
                if lease.holder:
                    self._led_s = self._machine_s()
                wait_s = min(left_s + 0.01, _LOOK_S)
            except ServiceError as error:
                self._note_leader(error)
                if error.reason != Reason.ERROR_REASON_NOT_LEADER:
                    _log.warning("the store does not answer a standby", extra={"reason": str(error)})
            await asyncio.sleep(wait_s)

    async def until_replaced(self) -> None:
        """Wait until the term is over: another planner has taken over, or the lease could not be renewed."""
        await self._ended.wait()

    async def until_failed(self) -> None:
        """Wait until the store is closed; raise the error that ended the guard of its connections."""
        guard = self._guard
        if guard is not None:
            await asyncio.wait({guard})
            if not guard.cancelled():
                guard.result()

    async def read(self, work: Callable[[Reader], T]) -> T:
        """Run ``work`` on one consistent state in the store's thread and return its result.

        A read does not queue behind a server that does not answer: it fails, so that the caller may try another
        planner. Raises STORE_UNAVAILABLE, or what ``work`` raises.
        """
        reading: asyncio.Future[T] = asyncio.ensure_future(self._run(self._timed, self._read, work))
        reading.add_done_callback(_forget)  # it may continue after its caller stops waiting
        if self._lease_s and not await self._ends_in_time(reading):
            message = f"the planner's store {self._label} has not answered for {self.health.answered_s_ago:.1f} s"
            raise ServiceError(Reason.ERROR_REASON_STORE_UNAVAILABLE, message, metadata={"changed": "no"})
        return await reading

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Run ``work`` in the store's thread and return its result once its changes are durable.

        If it raises, no change is made. Raises NOT_LEADER or STORE_UNAVAILABLE, or what ``work`` raises.
        """
        ended = self._ended
        try:
            self._require_decision()
            # The context contains the caller, for work that writes to the audit log.
            writing = self._run(contextvars.copy_context().run, self._timed, self._write, work)
            return await (self._unless(ended, writing) if self._lease_s else writing)
        except ServiceError as error:
            if error.reason == Reason.ERROR_REASON_NOT_LEADER and ended is self._ended:
                self._note_leader(error)
                self._end_term()
            raise

    def require_term(self) -> None:
        """Raise NOT_LEADER, with the leader if it is known, unless this planner leads and its lease is held."""
        if self._epoch is None or not self.lease.is_held:
            raise self.not_leader()

    def not_leader(self) -> ServiceError:
        """Return the error for callers that have reached a planner that does not lead."""
        if not self._is_led:
            return leadership.nobody_leads()
        return leadership.not_leader(self._leader.to_text() if self._leader is not None else "")

    def undecided(self) -> ServiceError:
        """Return the error for callers in the last third of the lease."""
        return ServiceError(
            Reason.ERROR_REASON_STORE_UNAVAILABLE,
            f"the lease of this planner on {self._label} was not renewed for {self.lease.age_s:.1f} s of"
            f" {self._lease_s:g} s; nothing was changed",
            metadata={"changed": "no"},
            retry_after_s=max(self.lease.left_s, 0.0),
        )

    async def close(self) -> None:
        """Allow another planner to take over, and close the store. Further calls do nothing."""
        await _end(self._guard)
        await _end(self._renewal)
        self._guard = self._renewal = None
        epoch, self._epoch = self._epoch, None
        self.lease.end()  # nobody renews it any more, and the server may take longer to hear of that than it lasts
        try:
            with contextlib.suppress(ServiceError):
                await self._limited(self._close_lease, epoch)
            closing = self._run(self._close)
            done, _ = await asyncio.wait({asyncio.ensure_future(closing)}, timeout=self._limit_s)
            if not done:
                self._breaker.break_connection()
        except RuntimeError:  # already closed
            return
        self._thread.shutdown(wait=False)
        self._lease_thread.shutdown(wait=False)

    # --- The term

    def _require_decision(self) -> None:
        self.require_term()
        if not self.lease.may_decide:
            raise self.undecided()

    async def _ends_in_time(self, reading: asyncio.Future[T]) -> bool:
        """Wait for a read while the store still answers any query, and return whether the read ended."""
        wait_s = _TRY_S
        while wait_s > 0:
            done, _ = await asyncio.wait({reading}, timeout=wait_s)
            if done:
                return True
            silent_s = max(min(self.health.running_s, self._breaker.silent_s), self.health.failing_s)
            wait_s = self._limit_s - silent_s
        return False

    async def _unless(self, ended: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of ``work`` if the term in which it began still holds; otherwise raise an error."""
        working, ending = asyncio.ensure_future(work), asyncio.ensure_future(ended.wait())
        working.add_done_callback(_forget)  # the caller may be cancelled
        try:
            await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ending.cancel()
        if working.done() and self.lease.is_held and not ended.is_set():
            return working.result()
        if working.done() and (error := working.exception()) is not None:
            raise error
        lost = self.not_leader()
        message = f"{lost}; the lease ended while the change was made, and it is unknown whether it took effect"
        raise ServiceError(lost.reason, message, metadata={**lost.metadata, "changed": "unknown"})

    def _end_term(self) -> None:
        if self._has_begun:
            self._led_s = self._machine_s()
        self._epoch, self._shown, self._has_begun = None, "", False
        self.lease.end()
        self.health.writes_work()  # as far as is known: a standby writes nothing
        self._ended.set()

    def _note_leader(self, error: ServiceError) -> None:
        if error.reason != Reason.ERROR_REASON_NOT_LEADER:
            return
        # A renewed lease lasts no longer than one that was just taken; a file's lock has no end that could be seen.
        left_s = (self._lease_s if error.retry_after_s is None else error.retry_after_s) if self._lease_s else math.inf
        if "leader" not in error.metadata:  # unknown, or it has not begun its term
            self._note_lease("", left_s)
            return
        self._led_s = self._machine_s()
        self._note_lease(f"{error.metadata['leader']} {error.metadata.get('leader_address', '')}", left_s)

    def _note_lease(self, holder: str, left_s: float) -> None:
        """Note that another planner with this text, if it has begun its term, holds the lease for ``left_s``."""
        self._leader = Holder.from_text(holder) if holder else None
        self._leads_until_s = self._machine_s() + left_s

    async def _renew_for_ever(self, epoch: int) -> None:
        """Renew the lease until the term ends. Every exit ends the term, except a cancellation by the task's owner."""
        try:
            await self._renew_while_held(epoch)
        except asyncio.CancelledError:
            raise
        except Exception:
            _log.exception("the lease is no longer being renewed")
        self._end_term()

    async def _renew_while_held(self, epoch: int) -> None:
        """Renew from the event loop, so that a planner whose event loop hangs also loses its lease."""
        trouble = ""
        asked_s = self._machine_s()
        while self._epoch == epoch and self.lease.is_held:
            # Counted from request to request, so that the time of an answer is not added. Never past the end of the
            # lease: pending writes must learn of it.
            rest_s = asked_s + self._lease_s / _RENEWALS - self._machine_s()
            await asyncio.sleep(max(min(rest_s, self.lease.left_s), 0.0))
            if not self.lease.is_held:
                continue  # the process was suspended
            asked_s = self._machine_s()
            try:
                await self._limited(self._renew, epoch, limit_s=min(2 * self._lease_s / _RENEWALS, self.lease.left_s))
            except Exception as error:  # whatever the exception, the lease ends by the clock
                if isinstance(error, ServiceError) and error.reason == Reason.ERROR_REASON_NOT_LEADER:
                    self._note_leader(error)
                    _log.error("another planner has taken over", extra=dict(error.metadata))
                    return
                trouble = str(error)
                _log.warning("the lease was not renewed", extra={"age_s": round(self.lease.age_s, 3), "why": trouble})
            else:
                # A term that is over stays over, whatever the server has granted since: callers know that it ended.
                if self._epoch == epoch and self.lease.is_held:
                    self.lease.grant(asked_s)
        if self._epoch == epoch:
            _log.error("the lease ran out", extra={"why": trouble})
            self._breaker.break_connection()

    # --- The connections

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    async def _limited(self, work: Callable[..., T], *arguments: object, limit_s: float | None = None) -> T:
        """Run ``work`` in the lease's thread and return its result; break the connection if it takes too long.

        Raises:
            ServiceError: what ``work`` raises; STORE_UNAVAILABLE after ``limit_s`` if the store is on a server.
        """
        working = asyncio.get_running_loop().run_in_executor(self._lease_thread, work, *arguments)
        if self._lock is not None or not self._lease_s:
            return await working
        limit_s = self._limit_s if limit_s is None else max(limit_s, 0.0)
        working.add_done_callback(_forget)
        try:
            done, _ = await asyncio.wait({working}, timeout=limit_s)
        finally:
            working.cancel()  # drops work not yet begun, which would request a lease that is not wanted any more
        if not done:
            self._lease_breaker.break_connection()
            message = f"the planner's store {self._label} did not answer for {limit_s:.1f} s"
            raise ServiceError(Reason.ERROR_REASON_STORE_UNAVAILABLE, message, metadata={"changed": "unknown"})
        return working.result()

    async def _watch_over(self) -> None:
        """Break a connection that has gone silent, probe a store that was not queried for a while, keep its lock."""
        probing: asyncio.Task[Any] | None = None
        locking: asyncio.Task[Any] | None = None
        trying: asyncio.Task[Any] | None = None
        tried_s = 0.0
        while True:
            await asyncio.sleep(min(_PROBE_S, self._limit_s) / 4)
            if self._lease_s and min(self.health.running_s, self._breaker.silent_s) > self._limit_s:
                self._breaker.break_connection()
            if self.health.answered_s_ago > _PROBE_S and (probing is None or probing.done()):
                probing = asyncio.create_task(self._probe())
                probing.add_done_callback(_forget)
            is_due = self._epoch is not None and self._machine_s() - tried_s > _PROBE_S
            if is_due and self.health.is_unwritable and (trying is None or trying.done()):
                tried_s = self._machine_s()
                trying = asyncio.ensure_future(self._run(self._timed, self._try_to_write))
                trying.add_done_callback(_forget)
            if self._has_lost_lock and (locking is None or locking.done()):
                locking = asyncio.create_task(self._lock_again())
                locking.add_done_callback(_forget)

    async def _probe(self) -> None:
        epoch = self._epoch
        lease, _, _ = await self._run(self._timed, self._look_by, self._readers)
        if epoch is not None and epoch == self._epoch != lease.epoch:
            self._replaced(leadership.not_leader(lease.holder))

    @property
    def _has_lost_lock(self) -> bool:
        """Whether the lock's file was removed or replaced during the term, but not that of the store."""
        lock = self._lock
        return (
            lock is not None
            and self._epoch is not None
            and not lock.is_held
            and opening.identity_of(lock.store) == self._file
        )

    async def _lock_again(self) -> None:
        """Take the lock again, or end the term if another planner has taken it first."""
        if (epoch := self._epoch) is None:  # the term has ended since the check
            return
        try:
            await self._run(self._timed, self._take_lock, epoch)
        except StoreError as error:
            _log.warning("the store's lock was removed: %s", error)
        except ServiceError as error:
            if error.reason == Reason.ERROR_REASON_NOT_LEADER and epoch == self._epoch:
                self._replaced(error)
        else:
            _log.warning("the store's lock was removed or replaced, and was taken again", extra={"store": self._label})

    def _replaced(self, error: ServiceError) -> None:
        self._note_leader(error)
        _log.error("another planner has taken over", extra=dict(error.metadata))
        self._end_term()

    async def _open_after_older_ones(self) -> None:
        """Open the store; wait for the lease of an older planner, which may have been killed, to expire once."""
        try:
            await self._open_in_time()
        except _OlderLeaderError as error:
            await asyncio.sleep(min(error.left_s, self._limit_s))
            await self._open_in_time()

    async def _open_in_time(self) -> None:
        """Wait for as long as the server answers anything, since a migration may take its time."""
        working = asyncio.ensure_future(self._run(self._open))
        working.add_done_callback(_forget)
        while True:
            done, _ = await asyncio.wait({working}, timeout=self._limit_s / 4)
            if done:
                return working.result()
            limit_s = _MIGRATION_S if self._is_migrating else self._limit_s
            if self._lease_s and self._breaker.silent_s > limit_s:
                raise StoreError(f"store {self._label} cannot be reached: no answer for {limit_s:.1f} s")

    # --- In the store's thread from here on

    def _open(self) -> None:
        if self._lock is not None:
            opening.make_private(self._lock.store)
        try:
            with self._readers.begin() as connection:
                if self._lock is not None:
                    opening.check_file(connection, self._label)
                old = schema.needs_migration(connection, self._label)
            if self._lock is not None:
                opening.keep_private(self._lock.store)
                opening.use_write_ahead_log(self._engine)
                self._file = opening.identity_of(self._lock.store)
            if old:
                self._migrate()
        except sa.exc.DBAPIError as error:
            raise opening.cannot_open(error, self._label) from None
        except sqlite3.Error as error:
            raise StoreError(f"store {self._label} cannot be written: {error}") from None

    def _migrate(self) -> None:
        if self._lock is not None and not self._lock.take():
            raise StoreError(
                f"store {self._label} is in use by another planner and older than this one; stop the other planner"
            )
        self._is_migrating = True
        try:
            with self._engine.begin() as connection:
                if connection.dialect.name == "postgresql":
                    schema.allow_pauses(connection)
                    schema.lock_out_others(connection)
                if schema.needs_migration(connection, self._label):  # no other planner has migrated it in the meantime
                    is_new = schema.revision_of(connection) is None
                    if not is_new:
                        self._end_older_terms(connection)
                    schema.migrate(connection)
                    if is_new:
                        leadership.begin_at(connection, leadership.epoch_at(self.clock()))
        finally:
            self._is_migrating = False
            if self._lock is not None:
                self._lock.release()

    def _end_older_terms(self, connection: sa.Connection) -> None:
        """End the terms of older planners, which would write to tables that they do not know.

        One that still leads is not interrupted: what it has promised its callers must stay as it is.
        """
        holder, left_s = leadership.end_terms(connection)
        if left_s > 0:
            raise _OlderLeaderError(
                f"store {self._label} is in use by {holder.title}, which is older than this one; stop all"
                " older planners, then start this one",
                left_s=left_s,
            )

    def _look(self) -> tuple[GrantedLease, float]:
        """Return the lease and the seconds left of it; 0 for a file, whose lock determines whether it is free.

        Raises StoreError if a planner of another version has migrated the tables.
        """
        lease, left_s, version = self._look_by(self._lease_looks)
        schema.require_unchanged(version, self._label)
        return lease, 0.0 if self._lock is not None else left_s

    def _look_by(self, engine: sa.Engine) -> tuple[GrantedLease, float, str]:
        with self._begun(engine) as connection:
            lease, left_s, version = leadership.look(connection)
        if self._epoch is None and self._lease_s:
            self._note_lease(lease.holder, left_s)
        return lease, left_s, version

    def _lead(self, abandoned: GrantedLease | None) -> tuple[float, int]:
        """Take the leadership; return when the lease begins to count, and the epoch."""
        self._take_lock()
        try:
            with self._begun(self._lease_engine) as connection:
                asked_s = self._machine_s()  # after connecting, which is not part of the lease
                epoch = leadership.take(connection, store=self._label, lease_s=self._lease_s, abandoned=abandoned)
                return asked_s, epoch
        except BaseException:
            if self._lock is not None:
                self._lock.release()  # another planner on the file would take this one for its leader
            raise

    def _take_lock(self, epoch: int | None = None) -> None:
        """Take the file's lock, for the term with this epoch if there is one.

        Raises NOT_LEADER if another planner has it, or had it after the term began.
        """
        if self._lock is None:
            return
        is_taken = self._lock.take()
        if is_taken and epoch is None:
            return
        with self._begun(self._readers) as connection:
            lease, _, _ = leadership.look(connection)
        if not is_taken or lease.epoch != epoch:
            self._lock.release()
            raise leadership.not_leader(lease.holder, store=self._label)

    def _renew(self, epoch: int) -> None:
        with self._begun(self._lease_statements) as connection:
            leadership.renew(connection, epoch, lease_s=self._lease_s, holder=self._shown)

    def _read(self, work: Callable[[Reader], T]) -> T:
        with self._begun(self._readers) as connection:
            return work(Reader(connection))

    def _write(self, work: Callable[[Transaction], T]) -> T:
        self._require_decision()  # the work may have waited long for its turn
        epoch = self._epoch
        if epoch is None:  # the term has ended since the check
            raise self.not_leader()
        try:
            return self._write_in(epoch, work)
        except ServiceError as error:
            if error.reason == Reason.ERROR_REASON_STORE_UNAVAILABLE and epoch == self._epoch:
                self.health.write_failed()
            raise

    def _write_in(self, epoch: int, work: Callable[[Transaction], T]) -> T:
        with self._begun(self._engine) as connection:
            leadership.check(connection, epoch)
            return work(Transaction(connection, now_s=self.clock()))

    def _try_to_write(self) -> None:
        """Write something that leaves nothing, to learn whether writes work again."""

        def work(tx: Transaction) -> None:  # an update to the same value would not do: SQLite skips it
            tx.plan_documents.put(_TRIAL, b"")
            tx.plan_documents.delete(_TRIAL)

        if (epoch := self._epoch) is not None:
            self._write_in(epoch, work)  # if it fails, that is not news: only changes that fail count
            self.health.trial_worked()

    @contextlib.contextmanager
    def _begun(self, engine: sa.Engine) -> Iterator[sa.Connection]:
        """Begin a transaction, in which problems of the store are raised as STORE_UNAVAILABLE."""
        # SQLite would write on to a file that was removed: what it acknowledged would be gone with the process.
        if self._lock is not None and opening.identity_of(self._lock.store) != self._file:
            raise opening.moved(self._label)
        try:
            with engine.begin() as connection:
                yield connection
        except sa.exc.DBAPIError as error:
            if opening.is_a_bug(error):
                raise
            raise opening.unavailable(error, self._label) from None

    def _timed(self, work: Callable[..., T], *arguments: object) -> T:
        with self.health.counted():
            return work(*arguments)

    def _give_up(self, epoch: int) -> None:
        """Let another planner take over while this store stays open."""
        self._release(epoch)
        if self._lock is not None:
            self._lock.release()

    def _release(self, epoch: int) -> None:
        if self._lease_s:
            with contextlib.suppress(sa.exc.DBAPIError), self._lease_statements.begin() as connection:
                leadership.release(connection, epoch)  # otherwise the lease would have to expire

    def _close_lease(self, epoch: int | None) -> None:
        if epoch is not None:
            self._release(epoch)
        if self._lease_engine is not self._engine:
            self._lease_engine.dispose()
            self._lease_breaker.close()

    def _close(self) -> None:
        self._engine.dispose()
        self._breaker.close()
        if self._lock is not None:
            self._lock.release()


def _forget(task: asyncio.Future[Any]) -> None:
    """Retrieve the exception of a task whose caller no longer waits, so that asyncio does not log it."""
    if not task.cancelled():
        task.exception()


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
