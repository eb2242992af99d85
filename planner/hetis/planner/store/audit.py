"""The audit log: who changed what, when, and what became of it. Lines are only ever added.

Each line has the hash of the one before it in its own, so that a line that was changed, taken out or put in between
breaks the chain from there on. Whoever can write to the database can make the whole chain anew, or cut its end off:
keep the last hash elsewhere now and then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa

from hetis.planner.store import schema

OK = "OK"
REPEATED = "REPEATED"
_PAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedChange:
    """What a line is about.

    Attributes:
        caller, role: the name of credentials, and what they were given for.
        method: such as ``CreateCluster``.
        resource: its name; empty where there was none.
        request_id: as the caller gave it.
        plan: that was chosen or made.
        outcome: `OK`; `REPEATED`: a request that had been done before; else the reason of the error.
        times: of refusals how many were the same since the last line of that kind.
    """

    caller: str
    role: str
    method: str
    resource: str = ""
    request_id: str = ""
    plan: str = ""
    outcome: str = OK
    times: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A change as it stands in the log. ``number`` counts from 1, ``time_s`` is Unix time, ``epoch`` the term's."""

    number: int
    time_s: float
    epoch: int
    change: AuditedChange
    hash: str

    def expected_hash(self, before: str) -> str:
        """Of what stands in the line, and the hash of the one before."""
        change = self.change
        values = [
            *(before, self.number, self.time_s, self.epoch),
            *(change.caller, change.role, change.method, change.resource),
            *(change.request_id, change.plan, change.outcome, change.times),
        ]
        return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()


class AuditLog:
    """The log as one transaction sees it."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def lines(self, *, after: int = 0) -> Iterator[Line]:
        """All lines with a higher number, in their order."""
        table = schema.audit
        while True:
            query = sa.select(table).where(table.c.number > after).order_by(table.c.number).limit(_PAGE)
            rows = self._connection.execute(query).all()
            for row in rows:
                yield _line(row)
            if len(rows) < _PAGE:
                return
            after = rows[-1].number

    def last(self) -> Line | None:
        table = schema.audit
        row = self._connection.execute(sa.select(table).order_by(table.c.number.desc()).limit(1)).one_or_none()
        return None if row is None else _line(row)

    def append(self, change: AuditedChange, *, time_s: float) -> None:
        """Adds a line; of a write transaction, of which there is one at a time."""
        last = self.last()
        number, before = (last.number + 1, last.hash) if last is not None else (1, "")
        epoch = self._connection.execute(sa.select(schema.leadership.c.epoch)).scalar_one()
        unsigned = Line(number=number, time_s=time_s, epoch=epoch, change=change, hash="")
        self._connection.execute(
            sa.insert(schema.audit).values(
                number=number,
                time_s=time_s,
                epoch=epoch,
                caller=change.caller,
                role=change.role,
                method=change.method,
                resource=change.resource,
                request_id=change.request_id,
                plan=change.plan,
                outcome=change.outcome,
                times=change.times,
                hash=unsigned.expected_hash(before),
            )
        )

    def first_wrong(self) -> int | None:
        """The number of the first line that is not what it was or does not follow the one before; None: all do."""
        number, before = 0, ""
        for line in self.lines():
            if line.number != number + 1 or line.hash != line.expected_hash(before):
                return number + 1
            number, before = line.number, line.hash
        return None


def _line(row: sa.Row[tuple[object, ...]]) -> Line:
    change = AuditedChange(
        caller=row.caller,
        role=row.role,
        method=row.method,
        resource=row.resource,
        request_id=row.request_id,
        plan=row.plan,
        outcome=row.outcome,
        times=row.times,
    )
    return Line(number=row.number, time_s=row.time_s, epoch=row.epoch, change=change, hash=row.hash)
