"""The audit log: who changed what, when, and what became of it. Lines are only ever added.

Each line has the hash of the one before it in its own, so that a line that was changed, taken out or put in between
breaks the chain from there on. Whoever can write to the database can make the whole chain anew, or cut its end off:
keep the last hash elsewhere now and then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import sqlalchemy as sa

import hetis.planner.store.schema as schema

OK = "OK"
REPEATED = "REPEATED"
_PAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedChange:
    """What a line is about; a column for each field, which the hash is of in this order.

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
class AuditLine:
    """A change as it stands in the log. ``number`` counts from 1, ``time_s`` is Unix time, ``epoch`` the term's."""

    number: int
    time_s: float
    epoch: int
    change: AuditedChange
    hash: str

    def expected_hash(self, before: str) -> str:
        """Return the hash of what stands in the line and of the hash of the one before."""
        values = [before, self.number, self.time_s, self.epoch, *asdict(self.change).values()]
        return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFilter:
    """Which lines are asked for; what is None is not looked at.

    Attributes:
        caller, method, outcome: as they stand in a line.
        resource: what was changed, or the plan that was chosen.
        since_s, until_s: Unix time, both included.
    """

    caller: str | None = None
    method: str | None = None
    outcome: str | None = None
    resource: str | None = None
    since_s: float | None = None
    until_s: float | None = None

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        column = schema.audit.c
        equal = ((column.caller, self.caller), (column.method, self.method), (column.outcome, self.outcome))
        found: list[sa.ColumnElement[bool]] = [have == wanted for have, wanted in equal if wanted is not None]
        if self.resource is not None:
            found.append(sa.or_(column.resource == self.resource, column.plan == self.resource))
        if self.since_s is not None:
            found.append(column.time_s >= self.since_s)
        if self.until_s is not None:
            found.append(column.time_s <= self.until_s)
        return found


class AuditLog:
    """The log as one transaction sees it."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def page(self, after: int, limit: int, which: AuditFilter | None = None) -> list[AuditLine]:
        """The next lines with a higher number, in their order."""
        table = schema.audit
        conditions = [table.c.number > after, *(which or AuditFilter()).conditions()]
        query = sa.select(table).where(*conditions).order_by(table.c.number).limit(limit)
        return [_line(row) for row in self._connection.execute(query)]

    def lines(self, which: AuditFilter | None = None) -> Iterator[AuditLine]:
        """All of them, in their order."""
        after, is_more = 0, True
        while is_more:
            found = self.page(after, _PAGE, which)
            yield from found
            is_more = len(found) == _PAGE
            after = found[-1].number if found else after

    def last(self) -> AuditLine | None:
        table = schema.audit
        row = self._connection.execute(sa.select(table).order_by(table.c.number.desc()).limit(1)).one_or_none()
        return None if row is None else _line(row)

    def append(self, change: AuditedChange, *, time_s: float) -> None:
        """Adds a line; of a write transaction, of which there is one at a time."""
        last = self.last()
        number, before = (last.number + 1, last.hash) if last is not None else (1, "")
        epoch = self._connection.execute(sa.select(schema.leadership.c.epoch)).scalar_one()
        unsigned = AuditLine(number=number, time_s=time_s, epoch=epoch, change=change, hash="")
        self._connection.execute(
            sa.insert(schema.audit).values(
                number=number,
                time_s=time_s,
                epoch=epoch,
                **asdict(change),
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


def _line(row: sa.Row[Any]) -> AuditLine:
    change = AuditedChange(**{field.name: getattr(row, field.name) for field in fields(AuditedChange)})
    return AuditLine(number=row.number, time_s=row.time_s, epoch=row.epoch, change=change, hash=row.hash)
