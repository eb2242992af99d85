"""Leadership: the writer's term, its epoch, and the lease that holds it on a server.

Every write transaction reads the epoch from the one row under a lock, so that either a takeover waits for the
transaction, or the transaction comes after the takeover and fails. A planner that lost its term can therefore change
nothing, whatever it believes and whatever its clock says.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

import hetis.planner.store.schema as schema
from hetis.planner.failures import Reason, ServiceError

_ROW = schema.leadership.c.id == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The holder of the leadership.

    Attributes:
        name: shown to people, without blanks.
        addresses: where callers reach it; empty if not known.
    """

    name: str
    addresses: tuple[str, ...] = ()

    @classmethod
    def from_text(cls, text: str) -> Holder:
        name, _, addresses = text.partition(" ")
        return cls(name=name, addresses=tuple(addresses.split(",")) if addresses else ())

    def to_text(self) -> str:
        """Return the text that is stored in the one row."""
        return f"{self.name} {','.join(self.addresses)}" if self.addresses else self.name


def look(connection: sa.Connection) -> tuple[Holder, float]:
    """Return the last leader and the seconds left of its lease, negative if it has expired. Takes no lock."""
    left_s = (schema.leadership.c.lease_end_s - _now(connection)).label("left_s")
    row = connection.execute(sa.select(schema.leadership.c.holder, left_s).where(_ROW)).one()
    return Holder.from_text(row.holder), float(row.left_s)


def take(connection: sa.Connection, holder: str, *, store: str, lease_s: float) -> int:
    """Start a new term and return its epoch.

    Args:
        connection: in a write transaction.
        holder: the new leader, for messages.
        store: the store's name in messages.
        lease_s: how long, by the server's clock, before others may take over; 0 if a file lock holds the term.

    Raises:
        ServiceError: NOT_LEADER, with the leader and when to try again.
    """
    left_s = (schema.leadership.c.lease_end_s - _now(connection)).label("left_s")
    row = connection.execute(sa.select(schema.leadership, left_s).where(_ROW).with_for_update()).one()
    if row.left_s > 0:
        raise not_leader(row.holder, store=store, retry_after_s=float(row.left_s))
    epoch: int = row.epoch + 1
    lease_end_s = _now(connection) + lease_s if lease_s else 0.0
    values = {"epoch": epoch, "holder": holder, "lease_end_s": lease_end_s}
    connection.execute(sa.update(schema.leadership).where(_ROW).values(values))
    return epoch


def renew(connection: sa.Connection, epoch: int, *, lease_s: float) -> None:
    """Prolong the lease in one statement. Raises NOT_LEADER if another planner has taken over."""
    ours = sa.and_(_ROW, schema.leadership.c.epoch == epoch)
    lease_end_s = _now(connection) + lease_s
    if not connection.execute(sa.update(schema.leadership).where(ours).values(lease_end_s=lease_end_s)).rowcount:
        raise not_leader(holder_of(connection))


def release(connection: sa.Connection, epoch: int) -> None:
    """Let another planner take over at once; does nothing if one already has."""
    ours = sa.and_(_ROW, schema.leadership.c.epoch == epoch)
    connection.execute(sa.update(schema.leadership).where(ours).values(lease_end_s=0.0))


def check(connection: sa.Connection, epoch: int) -> None:
    """Hold the term until the transaction ends. Raises NOT_LEADER if the term is over."""
    columns = schema.leadership.c.epoch, schema.leadership.c.holder
    # KEY SHARE: a takeover (FOR UPDATE) waits for it, a concurrent renewal of the lease (NO KEY UPDATE) does not.
    row = connection.execute(sa.select(*columns).where(_ROW).with_for_update(read=True, key_share=True)).one()
    if row.epoch != epoch:
        raise not_leader(row.holder)


def holder_of(connection: sa.Connection) -> str:
    """Return the last leader."""
    return str(connection.execute(sa.select(schema.leadership.c.holder).where(_ROW)).scalar_one())


def not_leader(leader: str, *, store: str = "", retry_after_s: float | None = None) -> ServiceError:
    """Return the error for a planner that does not lead.

    Args:
        leader: the text of the one row, empty if not known.
        store: the store's name in messages.
        retry_after_s: when to try again.
    """
    holder = Holder.from_text(leader)
    what = f"another planner leads with the store {store}" if store else "another planner leads"
    metadata = {"leader": holder.name} if holder.name else {}
    if holder.addresses:
        metadata["leader_address"] = ",".join(holder.addresses)
    return ServiceError(
        Reason.ERROR_REASON_NOT_LEADER,
        f"{what}: {holder.name}" if holder.name else "this planner does not lead",
        metadata=metadata,
        retry_after_s=retry_after_s,
    )


def _now(connection: sa.Connection) -> sa.ColumnElement[float]:
    """Return Unix time by the server's clock, which all planners share, as an expression to use within a statement.

    A query of its own would cost each renewal another round trip. SQLite has no lease and needs no time.
    """
    if connection.dialect.name == "sqlite":
        return sa.literal(0.0)
    return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double)
