"""Leadership of a store: from watching another leader, through a term of this planner, to the end of the term."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa

import hetis.planner.store.lease as rows
import hetis.planner.store.schema as schema
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.store.connection import StoreConnection
from hetis.planner.store.lease import AnotherLeadsError, FileLock, GrantedLease, Holder, Lease, RenewalWatch
from hetis.planner.store.opening import StoreError

T = TypeVar("T")
_RENEWALS = 6  # per lease; one attempt may take two such intervals
_LATE = 0.5  # share of a lease of which less is left only if several renewals failed
_LOOK_S = 0.5  # interval at which a standby checks who leads
_log = logging.getLogger("hetis.planner.store")


class LeadershipState(enum.Enum):
    """What this planner is to its store."""

    WATCHING = "watching"  # it has had no term yet, or stands by
    TAKEN = "taken"  # it has a term that has not begun: it loads its state, and answers nobody
    LEADING = "leading"  # its term has begun, and others call it the leader
    ENDED = "ended"  # its last term is over: replaced, expired or revoked


_HELD = LeadershipState.TAKEN, LeadershipState.LEADING


class Leadership:
    """This planner's leadership: its state, epoch and lease, and the connection and thread that renew the lease.

        WATCHING --grant--> TAKEN --promote--> LEADING
        TAKEN, LEADING --demote, revoke--> ENDED --stand_by--> WATCHING

    `demote` ends a term in this process, `revoke` also in the store, so that others need not wait for the lease. The
    store does nothing but refuse what is written with an older epoch (`rows.check`). Whatever happens to the
    connection, the term ends when the lease expires by this machine's clock.

    Args:
        connection: for a file that of the store, for a server one of its own.
        lease_s: how long a renewal is valid; 0 for a file, whose lock holds the term.
        limit_s: limit on a server's answer to one statement.
        machine: monotonic seconds.
        on_expiry: called when the lease has expired without a renewal.
        on_end: called at the end of each term.
    """

    def __init__(
        self,
        connection: StoreConnection,
        *,
        lease_s: float,
        limit_s: float,
        machine: Callable[[], float],
        on_expiry: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._lock = FileLock(connection.file) if connection.file else None
        self._lease_s, self._limit_s, self._machine_s = lease_s, limit_s, machine
        self._on_expiry, self._on_end = on_expiry, on_end
        self.state = LeadershipState.WATCHING
        self.epoch: int | None = None  # of the present term
        self.lease = Lease(lease_s, machine)  # of the present term
        self._ended = asyncio.Event()  # set when the present term is over
        self._renewal: asyncio.Task[None] | None = None  # renews the lease during a term on a server
        self._text = ""  # this planner's text as a leader
        self._shown = ""  # what renewals write as the leader's text: that of this planner once its term has begun
        self._leader: Holder | None = None  # the last leader seen, or the one that refused to be replaced
        self._leads_until_s = 0.0  # when the lease ends that another planner was last seen to hold, named or not
        self._led_s = machine()  # when this planner or another one was last known to lead

    @property
    def leader(self) -> Holder | None:
        """The other planner that leads, until its lease ends without having been seen renewed. None if unknown."""
        return self._leader if self._is_led else None

    @property
    def is_led_surely(self) -> bool:
        """Whether another planner was seen to have renewed its lease in time, as far as looks show. True for a file."""
        return not self._lease_s or self._leads_until_s - self._machine_s() > _LATE * self._lease_s

    @property
    def led_s_ago(self) -> float:
        """Seconds since any planner was last seen to lead, in a term that it had begun.

        They grow if a standby cannot take over, and also if planners take turns at terms that none of them can begin.
        """
        return self._machine_s() - self._led_s

    # --- The verbs

    async def grant(self, holder: str, addresses: Sequence[str] = (), *, abandoned: GrantedLease | None = None) -> int:
        """Take a term durably and return its epoch, which is above all earlier ones; then load the state and `promote`.

        Args:
            holder: this planner's name, for display.
            abandoned: a lease that may be ended before it expires, if it has not been renewed by now.

        Raises:
            AnotherLeadsError: another planner holds the file's lock or the server's lease.
            ServiceError: STORE_UNAVAILABLE.
            StoreError: the tables were migrated to another version since this planner opened the store.
        """
        await end_task(self._renewal)
        self._text, self._shown = Holder(name=holder.replace(" ", "_"), addresses=tuple(addresses)).to_text(), ""
        taking = asyncio.ensure_future(self._in_time(self._take, abandoned))
        try:
            requested_s, epoch = await asyncio.shield(taking)
        except AnotherLeadsError as error:
            self._note_leader(error)
            raise
        except asyncio.CancelledError:
            # A term that nobody knows of would keep others waiting for the end of its lease, or of this process.
            with contextlib.suppress(ServiceError, StoreError, sa.exc.DBAPIError):
                await self._in_time(self._release, (await taking)[1])
            raise
        self.state, self.epoch, self._ended = LeadershipState.TAKEN, epoch, asyncio.Event()
        self._note_lease("", 0.0)
        self.lease.grant(requested_s)
        if self._lease_s:
            self._renewal = asyncio.create_task(self._renew_for_ever(epoch), name="renewal of leadership")
        return epoch

    async def promote(self) -> None:
        """Announce durably that the term has begun: from now on this planner is what others call the leader.

        Raises NOT_LEADER if the term is over, or STORE_UNAVAILABLE.
        """
        epoch = self.epoch
        if epoch is None:
            raise self.not_leader()
        self._shown = self._text  # before the request, which a renewal must not undo
        await self._in_time(self._renew, epoch)
        if self.epoch == epoch:
            self.state, self._led_s = LeadershipState.LEADING, self._machine_s()

    def demote(self) -> None:
        """End the term, if there is one, in this process: nothing is decided in it any more."""
        if self.state not in _HELD:
            return
        if self.state is LeadershipState.LEADING:
            self._led_s = self._machine_s()
        self.state, self.epoch, self._shown = LeadershipState.ENDED, None, ""
        self.lease.end()
        self._ended.set()
        self._on_end()

    async def revoke(self) -> None:
        """End the term, if there is one, and allow another planner to take over at once."""
        await end_task(self._renewal)
        if (epoch := self.epoch) is not None:
            self.demote()  # first, since the server may take longer to hear of that than the lease lasts
            with contextlib.suppress(ServiceError, sa.exc.DBAPIError):
                await self._in_time(self._release, epoch)

    async def stand_by(self, holder: str, addresses: Sequence[str] = ()) -> int:
        """Wait until no planner leads, then take a term and return its epoch. Meanwhile `leader` names the leader.

        It does not wait for the end of a lease that nobody renews (`RenewalWatch`). If this planner holds a term that
        it failed to begin, that term is revoked first, and other planners get the first chance.

        Raises StoreError if a planner of another version migrates the tables meanwhile.
        """
        was_held = self.epoch is not None
        await self.revoke()
        if was_held:
            await asyncio.sleep(1.5 * _LOOK_S)  # long enough for every standby to look
        self.state, watch = LeadershipState.WATCHING, RenewalWatch(self._lease_s, self._machine_s)
        while True:
            wait_s = _LOOK_S
            try:
                lease, left_s = await self._in_time(self._look)
                if left_s <= 0:
                    return await self.grant(holder, addresses)
                if watch.is_abandoned(lease):
                    _log.warning(
                        "the lease has not expired, but nobody renews it: the store's clock may have stepped back",
                        extra={"leader": Holder.from_text(lease.holder).name, "left_s": round(left_s, 3)},
                    )
                    return await self.grant(holder, addresses, abandoned=lease)
                if lease.holder:
                    self._led_s = self._machine_s()
                wait_s = min(left_s + 0.01, _LOOK_S)
            except AnotherLeadsError as error:
                self._note_leader(error)
            except ServiceError as error:
                _log.warning("the store does not answer a standby", extra={"reason": str(error)})
            await asyncio.sleep(wait_s)

    async def until_ended(self) -> None:
        """Wait until the term is over: another planner has taken over, or the lease could not be renewed."""
        await self._ended.wait()

    async def close(self) -> None:
        """Revoke the term, and close the connection if it serves leadership alone."""
        await self.revoke()
        if self._lock is None:
            with contextlib.suppress(ServiceError):
                await self._in_time(self._connection.close)
            self._connection.end_thread()

    # --- What may be done in the term

    def require_decision(self) -> None:
        """Raise NOT_LEADER unless this planner has a term and its lease, STORE_UNAVAILABLE in its last third."""
        if self.epoch is None or not self.lease.is_held:
            raise self.not_leader()
        if not self.lease.may_decide:
            raise self.undecided()

    async def fenced(self, write: Callable[[], Awaitable[T]]) -> T:
        """Return the result of a write in the present term, if the term still holds when the write is done.

        Raises:
            ServiceError: what ``write`` raises; NOT_LEADER, and then the term is over, whatever else happens.
        """
        ended = self._ended
        try:
            self.require_decision()
            return await (self._unless(ended, write()) if self._lease_s else write())
        except ServiceError as error:
            if error.reason == Reason.ERROR_REASON_NOT_LEADER and ended is self._ended:
                if isinstance(error, AnotherLeadsError):
                    self._note_leader(error)
                self.demote()
            raise

    def not_leader(self) -> ServiceError:
        """Return the error for callers that have reached a planner that does not lead."""
        if not self._is_led:
            return rows.nobody_leads()
        return rows.another_leads(self._leader.to_text() if self._leader is not None else "")

    def undecided(self) -> ServiceError:
        """Return the error for callers in the last third of the lease."""
        return ServiceError(
            Reason.ERROR_REASON_STORE_UNAVAILABLE,
            f"the lease of this planner on {self._connection.label} was not renewed for {self.lease.age_s:.1f} s of"
            f" {self._lease_s:g} s; nothing was changed",
            metadata={"changed": "no"},
            retry_after_s=max(self.lease.left_s, 0.0),
        )

    async def _unless(self, ended: asyncio.Event, work: Awaitable[T]) -> T:
        """Return the result of ``work`` if the term in which it began still holds; otherwise raise an error."""
        working, ending = asyncio.ensure_future(work), asyncio.ensure_future(ended.wait())
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

    # --- Other planners

    @property
    def _is_led(self) -> bool:
        return self._machine_s() < self._leads_until_s

    def found(self, lease: GrantedLease, epoch: int | None) -> None:
        """Note a lease that was read during the term of ``epoch``, which is over if another one has begun."""
        if epoch is not None and epoch == self.epoch != lease.epoch:
            self._replaced(rows.another_leads(lease.holder))

    def _replaced(self, error: AnotherLeadsError) -> None:
        self._note_leader(error)
        _log.error("another planner has taken over", extra=dict(error.metadata))
        self.demote()

    def _note_leader(self, error: AnotherLeadsError) -> None:
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

    # --- The renewal

    async def _renew_for_ever(self, epoch: int) -> None:
        """Renew the lease until the term ends. Every exit ends the term, except a cancellation by the task's owner."""
        try:
            await self._renew_while_held(epoch)
        except asyncio.CancelledError:
            raise
        except Exception:
            _log.exception("the lease is no longer being renewed")
        if self.epoch == epoch:
            self.demote()

    async def _renew_while_held(self, epoch: int) -> None:
        """Renew from the event loop, so that a planner whose event loop hangs also loses its lease."""
        trouble = ""
        requested_s = self._machine_s()
        while self.epoch == epoch and self.lease.is_held:
            # Counted from request to request, so that the time of an answer is not added. Never past the end of the
            # lease: pending writes must learn of it.
            rest_s = requested_s + self._lease_s / _RENEWALS - self._machine_s()
            await asyncio.sleep(max(min(rest_s, self.lease.left_s), 0.0))
            if not self.lease.is_held:
                continue  # the process was suspended
            requested_s = self._machine_s()
            limit_s = min(2 * self._lease_s / _RENEWALS, self.lease.left_s)
            try:
                await self._in_time(self._renew, epoch, limit_s=limit_s)
            except AnotherLeadsError as error:
                self._replaced(error)
                return
            except Exception as error:  # whatever the exception, the lease ends by the clock
                trouble = str(error)
                _log.warning("the lease was not renewed", extra={"age_s": round(self.lease.age_s, 3), "why": trouble})
                if isinstance(error, ServiceError) and error.reason == Reason.ERROR_REASON_NOT_LEADER:
                    break  # it has expired by the clock of the store, where anyone may take it
            else:
                # A term that is over stays over, whatever the server has granted since: callers know that it ended.
                if self.epoch == epoch and self.lease.is_held:
                    self.lease.grant(requested_s)
        if self.epoch == epoch:
            _log.error("the lease ran out", extra={"why": trouble})
            self._on_expiry()

    # --- The lock of a file

    @property
    def has_lost_lock(self) -> bool:
        """Whether the lock's file was removed or replaced during the term, but not that of the store."""
        lock = self._lock
        return lock is not None and self.epoch is not None and not lock.is_held and self._connection.is_at_its_place

    async def lock_again(self) -> None:
        """Take the lock again, or end the term if another planner has taken it first."""
        if (epoch := self.epoch) is None:  # the term has ended since the check
            return
        try:
            await self._connection.run(self._take_lock, epoch)
        except StoreError as error:
            _log.warning("the store's lock was removed: %s", error)
        except AnotherLeadsError as error:
            if epoch == self.epoch:
                self._replaced(error)
        else:
            store = self._connection.label
            _log.warning("the store's lock was removed or replaced, and was taken again", extra={"store": store})

    # --- In the connection's thread from here on

    async def _in_time(self, work: Callable[..., T], *arguments: object, limit_s: float | None = None) -> T:
        return await self._connection.run_in_time(self._limit_s if limit_s is None else limit_s, work, *arguments)

    def look(self, connection: StoreConnection) -> tuple[GrantedLease, float, str]:
        """Return the last lease, the seconds left of it, and the tables' version, in the connection's thread."""
        with connection.begun(connection.looks) as begun:
            lease, left_s, version = rows.look(begun)
        if self.epoch is None and self._lease_s:
            self._note_lease(lease.holder, left_s)
        return lease, left_s, version

    def _look(self) -> tuple[GrantedLease, float]:
        """Return the lease and the seconds left of it; 0 for a file, whose lock determines whether it is free.

        Raises StoreError if a planner of another version has migrated the tables.
        """
        lease, left_s, version = self.look(self._connection)
        schema.require_unchanged(version, self._connection.label)
        return lease, 0.0 if self._lock is not None else left_s

    def _take(self, abandoned: GrantedLease | None) -> tuple[float, int]:
        """Take a term; return when its lease begins to count, and its epoch."""
        self._take_lock()
        store = self._connection.label
        try:
            with self._connection.begun(self._connection.engine) as connection:
                requested_s = self._machine_s()  # after connecting, which is not part of the lease
                epoch = rows.take(connection, store=store, lease_s=self._lease_s, abandoned=abandoned)
                return requested_s, epoch
        except BaseException:
            if self._lock is not None:
                self._lock.release()  # another planner on the file would take this one for its leader
            raise

    def _take_lock(self, epoch: int | None = None) -> None:
        """Take the file's lock, for the term with this epoch if there is one.

        Raises AnotherLeadsError if another planner has it, or had it after the term began.
        """
        if self._lock is None:
            return
        is_taken = self._lock.take()
        if is_taken and epoch is None:
            return
        with self._connection.begun(self._connection.looks) as connection:
            lease, _, _ = rows.look(connection)
        if not is_taken or lease.epoch != epoch:
            self._lock.release()
            raise rows.another_leads(lease.holder, store=self._connection.label)

    def _renew(self, epoch: int) -> None:
        with self._connection.begun(self._connection.statements) as connection:
            rows.renew(connection, epoch, lease_s=self._lease_s, holder=self._shown)

    def _release(self, epoch: int) -> None:
        if self._lock is not None:
            self._lock.release()
            return
        with self._connection.begun(self._connection.statements) as connection:
            rows.release(connection, epoch)  # otherwise the lease would have to expire


async def end_task(task: asyncio.Task[Any] | None) -> None:
    """Cancel a task, if there is one, and wait for its end."""
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
