"""The lease of a leader: its clock, the lock of a file, and the one row of the store that grants it.

Every write transaction reads the epoch from that row under a lock, so that either a takeover waits for the
transaction, or the transaction comes after the takeover and fails. A planner that lost its term can therefore change
nothing, whatever its own state and its clock.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

import hetis.planner.store.records as records
import hetis.planner.store.schema as schema
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.store.opening import StoreError


class FileLock:
    """A lock on ``FILE.lock`` beside a store. It is a separate file so that backups may read the store meanwhile."""

    def __init__(self, store: Path) -> None:
        self._path = store.with_name(f"{store.name}.lock")
        self.store = store
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this process has the lock, and any other process that tries to take it finds it taken.

        Not so once its file was removed or replaced: others would lock another file of the same name.
        """
        descriptor = self._descriptor
        if descriptor is None:
            return False
        try:
            held, found = os.fstat(descriptor), self._path.stat()
        except OSError:
            return False
        return os.path.samestat(held, found)

    def exists(self) -> bool:
        """Return whether any planner has ever had the lock."""
        return self._path.exists()

    def take(self) -> bool:
        """Take the lock, also again; return whether this process has it now. Raises StoreError if it has no file."""
        if self.is_held:
            return True
        self.release()  # of a file that was removed or replaced
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"store {self.store} cannot be locked: {self._path}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Release the lock. The file stays: if it were removed, two planners could lock two files of the same name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


DECIDING_SHARE = 2 / 3  # share of the lease after which, without a renewal, no new decisions are made
# A lease that nobody has renewed for so many leases, and at least so long, may be taken before it expires.
UNRENEWED_LEASES, UNRENEWED_S = 3, 60.0


def machine_s() -> float:
    """Return monotonic seconds, which include time in which the machine sleeps if the system counts it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Lease:
    """A term, and how long it may be used.

    The server counts a lease from the moment that it grants it, the holder from before its request. However long
    messages take, the holder stops first. The clocks need not agree on the time, only on how fast it passes.

    Args:
        lease_s: how long a renewal is valid; 0 means for ever, as if a file lock holds the term.
        clock: monotonic seconds.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float] = machine_s) -> None:
        self.lease_s = lease_s
        self.clock = clock
        self._requested_s: float | None = None  # when the lease that is held was requested; None: no lease is held

    def grant(self, requested_s: float) -> None:
        """Record that the server granted the renewal requested at ``requested_s``."""
        self._requested_s = requested_s

    def end(self) -> None:
        """End the term, whatever time remains."""
        self._requested_s = None

    @property
    def age_s(self) -> float:
        """Seconds since the last granted renewal was requested; 0 without a lease."""
        return self.clock() - self._requested_s if self._requested_s is not None and self.lease_s else 0.0

    @property
    def left_s(self) -> float:
        """How long the term may still be used; infinity stands for as long as the process lives."""
        if self._requested_s is None:
            return 0.0
        return self.lease_s - self.age_s if self.lease_s else float("inf")

    @property
    def is_overdue(self) -> bool:
        """Whether the lease has expired although the term was not ended."""
        return self._requested_s is not None and self.left_s <= 0

    @property
    def is_held(self) -> bool:
        return self.left_s > 0

    @property
    def may_decide(self) -> bool:
        """Whether new work may begin and end in the term, which is not so in the last third of the lease."""
        return self.left_s > self.lease_s * (1 - DECIDING_SHARE)


_ROW = records.leadership.c.id == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The holder of the leadership."""

    name: str  # for display; contains no blanks; empty until the term has begun
    addresses: tuple[str, ...] = ()  # addresses at which callers reach it; empty if unknown

    @classmethod
    def from_text(cls, text: str) -> Holder:
        name, _, addresses = text.partition(" ")
        return cls(name=name, addresses=tuple(addresses.split(",")) if addresses else ())

    @property
    def title(self) -> str:
        """Return what messages call it; the row of a planner whose term has not begun has no name."""
        return f"the planner {self.name}" if self.name else "a planner that begins its term"

    def to_text(self) -> str:
        """Return the text that is stored in the one row."""
        return f"{self.name} {','.join(self.addresses)}" if self.addresses else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantedLease:
    """The lease in the one row. A renewal replaces it by another one, which ends at another time."""

    epoch: int
    holder: str  # the text of the leader; empty until its term has begun
    lease_end_s: float

    @classmethod
    def from_row(cls, row: sa.Row[Any]) -> GrantedLease:
        return cls(epoch=row.epoch, holder=row.holder, lease_end_s=row.lease_end_s)


class RenewalWatch:
    """Finds a lease that nobody renews although the server says that it has not expired.

    The server's clock may step back, and a dead leader's lease then lasts longer by the whole step. But a leader also
    stops by its own clock, one lease after it requested its last renewal, and a standby sees the renewed lease only
    later: once a lease has passed here without another renewal, nobody leads. A longer wait tolerates clocks of
    different speeds, and a leader whose configured lease is longer than the standby's.

    Args:
        lease_s: the lease that the standby is configured with.
        clock: monotonic seconds.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float]) -> None:
        self.limit_s = max(UNRENEWED_LEASES * lease_s, UNRENEWED_S)
        self._clock = clock
        self._seen: GrantedLease | None = None
        self._first_s = 0.0  # when that lease was first seen

    def is_abandoned(self, lease: GrantedLease) -> bool:
        """Note the lease that was just seen, and return whether it has been the same for over ``limit_s``."""
        now_s = self._clock()
        if lease != self._seen:
            self._seen, self._first_s = lease, now_s
        return now_s - self._first_s > self.limit_s


def look(connection: sa.Connection) -> tuple[GrantedLease, float, str]:
    """Return the last leader's lease, the seconds left of it (negative if it has expired) and the tables' version.

    Takes no lock.
    """
    columns = records.leadership, _left_s(connection), schema.applied.label("version")
    row = connection.execute(sa.select(*columns).where(_ROW)).one()
    return GrantedLease.from_row(row), float(row.left_s), row.version


_FIRST_S = 1_767_225_600  # the start of 2026: counting epochs in seconds from here keeps them short


def epoch_at(now_s: float) -> int:
    """Return the least epoch of a store that was made or restored at this Unix time.

    Agents obey the highest epoch that they have seen, and a store that is lost or restored has forgotten its last ones.
    A planner begins fewer terms than one per second, so the clock is above all epochs of stores that were made before.
    """
    return max(int(now_s) - _FIRST_S, 0)


def begin_at(connection: sa.Connection, epoch: int) -> None:
    """Let the terms of a store that was just made follow ``epoch``."""
    connection.execute(sa.update(records.leadership).where(_ROW).values(epoch=epoch))


def end_terms(connection: sa.Connection) -> tuple[Holder, float]:
    """End all terms, and let no other one begin before the transaction ends.

    Whoever changes tables from outside a term calls this first. Returns the last leader and the seconds left of its
    lease; if they are positive, it still leads, and the caller rolls back.
    """
    columns = records.leadership.c.holder, _left_s(connection)
    row = connection.execute(sa.select(*columns).where(_ROW).with_for_update()).one()
    connection.execute(sa.update(records.leadership).where(_ROW).values(epoch=records.leadership.c.epoch + 1))
    return Holder.from_text(row.holder), float(row.left_s)


def take(connection: sa.Connection, *, store: str, lease_s: float, abandoned: GrantedLease | None = None) -> int:
    """Start a new term and return its epoch. The row names its holder only once `renew` does.

    Args:
        connection: a connection in a write transaction.
        store: the store's name in messages.
        lease_s: how long others may not take over, by the server's clock; 0 if a file lock holds the term.
        abandoned: a lease that may be ended before it expires, if it has not been renewed by now.

    Raises:
        AnotherLeadsError: with the leader and the time of the next attempt.
        StoreError: the tables were migrated to another version while this planner stood by.
    """
    columns = records.leadership, _left_s(connection)
    row = connection.execute(sa.select(*columns).where(_ROW).with_for_update()).one()
    if row.left_s > 0 and GrantedLease.from_row(row) != abandoned:
        raise another_leads(row.holder, store=store, retry_after_s=float(row.left_s))
    epoch: int = row.epoch + 1
    lease_end_s = _now(connection) + lease_s if lease_s else 0.0
    values = {"epoch": epoch, "holder": "", "lease_end_s": lease_end_s}
    # A statement after the one that locked the row, which may have waited for a migration that it does not see.
    ours = sa.and_(_ROW, schema.applied == schema.revisions()[-1])
    if not connection.execute(sa.update(records.leadership).where(ours).values(values)).rowcount:
        schema.require_unchanged(schema.revision_of(connection) or "nothing", store)
    return epoch


def renew(connection: sa.Connection, epoch: int, *, lease_s: float, holder: str) -> None:
    """Prolong the lease in one statement.

    A lease that has expired is not renewed: the request may have waited in the server, and its planner may have ended
    the term long ago, which would keep all others from leading for another lease.

    Args:
        holder: the text of the leader; empty while the term has not begun, so that nobody takes it for a leader.

    Raises:
        ServiceError: NOT_LEADER, as `AnotherLeadsError` if another planner has taken over.
    """
    ours = sa.and_(_ROW, records.leadership.c.epoch == epoch)
    held = sa.and_(ours, records.leadership.c.lease_end_s > _now(connection)) if lease_s else ours
    values = {"lease_end_s": _now(connection) + lease_s, "holder": holder}
    if not connection.execute(sa.update(records.leadership).where(held).values(values)).rowcount:
        row = connection.execute(sa.select(records.leadership).where(_ROW)).one()
        if row.epoch == epoch:
            message = "the lease of this planner had expired before its renewal reached the store"
            raise ServiceError(Reason.ERROR_REASON_NOT_LEADER, message)
        raise another_leads(row.holder)


def release(connection: sa.Connection, epoch: int) -> None:
    """Allow another planner to take over at once; does nothing if one already has."""
    ours = sa.and_(_ROW, records.leadership.c.epoch == epoch)
    connection.execute(sa.update(records.leadership).where(ours).values(lease_end_s=0.0))


def check(connection: sa.Connection, epoch: int) -> None:
    """Keep the term until the transaction ends. Raises AnotherLeadsError if the term is over."""
    columns = records.leadership.c.epoch, records.leadership.c.holder
    # KEY SHARE: a takeover (FOR UPDATE) waits for it, a concurrent renewal of the lease (NO KEY UPDATE) does not.
    row = connection.execute(sa.select(*columns).where(_ROW).with_for_update(read=True, key_share=True)).one()
    if row.epoch != epoch:
        raise another_leads(row.holder)


class AnotherLeadsError(ServiceError):
    """NOT_LEADER, because another planner has a term."""


def another_leads(leader: str, *, store: str = "", retry_after_s: float | None = None) -> AnotherLeadsError:
    """Return the error for a planner that does not lead while another one does.

    Args:
        leader: the text of the one row; empty if unknown, or if that planner has not begun its term.
        store: the store's name in messages.
    """
    holder = Holder.from_text(leader)
    what = f"another planner is the leader of store {store}" if store else "another planner is the leader"
    unnamed = f"{what}, but has not begun its term yet" if store else "this planner is not the leader"
    metadata = {"leader": holder.name} if holder.name else {}
    if holder.addresses:
        metadata["leader_address"] = ",".join(holder.addresses)
    return AnotherLeadsError(
        Reason.ERROR_REASON_NOT_LEADER,
        f"{what}: {holder.name}" if holder.name else unnamed,
        metadata=metadata,
        retry_after_s=retry_after_s,
    )


def nobody_leads() -> ServiceError:
    """Return the error for a planner that does not lead while no other one is known to."""
    message = "this planner is not the leader, and no planner leads now as far as it knows"
    return ServiceError(Reason.ERROR_REASON_NOT_LEADER, message)


def _left_s(connection: sa.Connection) -> sa.Label[float]:
    """Return the seconds left of the lease, as a column."""
    return (records.leadership.c.lease_end_s - _now(connection)).label("left_s")


def _now(connection: sa.Connection) -> sa.ColumnElement[float]:
    """Return Unix time by the server's clock, which all planners share, as an expression within a statement.

    A separate query would cost each renewal another round trip. SQLite has no lease, and needs no time.
    """
    if connection.dialect.name == "sqlite":
        return sa.literal(0.0)
    return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double)
