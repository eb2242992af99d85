"""The audit log: who changed what, when, and with what outcome. Lines are only ever added, and the oldest deleted.

The hash of a line covers the hash of the line before it, so a line that was changed, removed or inserted breaks the
chain from there on. An attacker who can write to the database can forge the whole chain or cut off its end; to detect
that, keep a copy of the last hash elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import sqlalchemy as sa

import hetis.planner.store.records as records

OK = "OK"
REPEATED = "REPEATED"
FORGET = "ForgetAuditedChanges"  # the method of lines about the lines that were deleted because of their age
PLANNER = "planner"  # who deletes them
_GONE = re.compile(r"auditedChanges/(\d{1,18})/([0-9a-f]{64})")
MOST_FORGOTTEN = 50_000  # lines deleted in one transaction
_PAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedChange:
    """The subject of an audit line. Each field has a column; the hash covers the fields in this order.

    Attributes:
        caller, role: the name of the caller's credentials, and their role.
    """

    caller: str
    role: str
    method: str  # such as ``CreateCluster``
    resource: str = ""  # name of the changed resource; empty if there was none
    request_id: str = ""  # as sent by the caller
    plan: str = ""  # the plan that was chosen or created
    outcome: str = OK  # `OK`; `REPEATED` for a request that had been carried out before; else the reason of the error
    times: int = 1  # for refusals: number of equal ones since the last line of that kind


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditLine:
    """An audited change in the log. ``number`` counts from 1, ``time_s`` is Unix time, ``epoch`` is the term's."""

    number: int
    time_s: float
    epoch: int
    change: AuditedChange
    hash: str

    def expected_hash(self, before: str) -> str:
        """Return the hash over the line's content and the hash of the line before it."""
        values = [before, self.number, self.time_s, self.epoch, *asdict(self.change).values()]
        return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFilter:
    """A selection of audit lines. Fields that are None match every line.

    Attributes:
        caller, method, outcome: as in the lines.
        since_s, until_s: Unix times, both inclusive.
    """

    caller: str | None = None
    method: str | None = None
    outcome: str | None = None
    resource: str | None = None  # the changed resource, or the plan that was chosen
    since_s: float | None = None
    until_s: float | None = None

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        column = records.audit.c
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
    """The audit log as seen by one transaction."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def page(self, after: int, limit: int, which: AuditFilter | None = None) -> list[AuditLine]:
        """Return up to ``limit`` lines with a number above ``after``, in order."""
        table = records.audit
        conditions = [table.c.number > after, *(which or AuditFilter()).conditions()]
        query = sa.select(table).where(*conditions).order_by(table.c.number).limit(limit)
        return [_line(row) for row in self._connection.execute(query)]

    def lines(self, which: AuditFilter | None = None) -> Iterator[AuditLine]:
        """Yield all matching lines in order."""
        after, is_more = 0, True
        while is_more:
            found = self.page(after, _PAGE, which)
            yield from found
            is_more = len(found) == _PAGE
            after = found[-1].number if found else after

    def last(self) -> AuditLine | None:
        table = records.audit
        row = self._connection.execute(sa.select(table).order_by(table.c.number.desc()).limit(1)).one_or_none()
        return None if row is None else _line(row)

    def append(self, change: AuditedChange, *, time_s: float) -> AuditLine:
        """Append a line, and return it. Requires a write transaction, of which there is only one at a time."""
        last = self.last()
        number, before = (last.number + 1, last.hash) if last is not None else (1, "")
        epoch = self._connection.execute(sa.select(records.leadership.c.epoch)).scalar_one()
        unsigned = AuditLine(number=number, time_s=time_s, epoch=epoch, change=change, hash="")
        line = replace(unsigned, hash=unsigned.expected_hash(before))
        values = {"number": number, "time_s": time_s, "epoch": epoch, **asdict(change), "hash": line.hash}
        self._connection.execute(sa.insert(records.audit).values(values))
        return line

    def forget_before(self, oldest_s: float, *, time_s: float) -> int:
        """Delete up to `MOST_FORGOTTEN` lines that precede the first one since ``oldest_s``; return their number.

        A further line tells the number and the hash of the last one that is deleted, from which the chain goes on. It
        requires a write transaction; ``time_s`` is now.
        """
        table = records.audit
        last, (forgotten, _) = self.last(), self._forgotten()
        since = sa.select(sa.func.min(table.c.number)).where(table.c.time_s >= oldest_s)
        first_kept = self._connection.execute(since).scalar_one_or_none() or (0 if last is None else last.number)
        first_kept = min(first_kept, forgotten + MOST_FORGOTTEN + 1)
        if first_kept <= forgotten + 1:
            return 0
        [gone] = self.page(first_kept - 2, 1)
        resource = f"auditedChanges/{gone.number}/{gone.hash}"
        self.append(AuditedChange(caller=PLANNER, role=PLANNER, method=FORGET, resource=resource), time_s=time_s)
        return self._connection.execute(sa.delete(table).where(table.c.number < first_kept)).rowcount

    def _forgotten(self) -> tuple[int, str]:
        """Return the number and the hash of the last line that was deleted because of its age; 0 if none was."""
        table = records.audit
        query = sa.select(table.c.resource).where(table.c.method == FORGET).order_by(table.c.number.desc()).limit(1)
        told: str | None = self._connection.execute(query).scalar_one_or_none()
        found = _GONE.fullmatch(told or "")
        return (int(found[1]), found[2]) if found else (0, "")

    def first_wrong(self) -> int | None:
        """Return the number of the first line that was altered or does not follow its predecessor, or None."""
        number, before = self._forgotten()
        for line in self.lines():
            if line.number != number + 1 or line.hash != line.expected_hash(before):
                return number + 1
            number, before = line.number, line.hash
        return None


def _line(row: sa.Row[Any]) -> AuditLine:
    change = AuditedChange(**{field.name: getattr(row, field.name) for field in fields(AuditedChange)})
    return AuditLine(number=row.number, time_s=row.time_s, epoch=row.epoch, change=change, hash=row.hash)
