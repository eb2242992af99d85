"""The tables as seen by one transaction: reads, writes, pages. An update fails if the record's version has changed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from typing import Any, Generic, TypeVar, get_type_hints, overload

import sqlalchemy as sa

import hetis.planner.store.records as records
from hetis.planner import failures
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.store.audit import AuditLog
from hetis.planner.store.records import (
    ClusterRecord,
    NodeRecord,
    PlanRecord,
    ProfileRecord,
    Record,
    RedispatchRecord,
    ReplicaRecord,
    TrafficRecord,
    etag_of,
)

R = TypeVar("R", bound=Record)
After = str | tuple[float, str] | None
Filter = str | int | bool | Collection[str] | Collection[int]

KEPT_REDISPATCHES = 1000  # per cluster, as redispatch.proto documents


class RecordKind(Generic[R]):
    """One kind of record: an attribute that is a `TableView` of a `Reader`, and a `RecordTable` of a `Transaction`."""

    def __init__(
        self,
        table: sa.Table,
        record: type[R],
        *,
        newest_first: bool = False,
        kept_per_cluster: int | None = None,
        final_states: Collection[int] = (),
    ) -> None:
        """Describe the records of ``table``.

        Args:
            newest_first: whether records are ordered by age instead of by name.
            kept_per_cluster: how many records a cluster keeps; adding one deletes older ones than these if they are in
                one of the ``final_states``.
        """
        self.table, self.record = table, record
        self.newest_first, self.kept_per_cluster = newest_first, kept_per_cluster
        self.final_states = tuple(final_states)
        self.body = get_type_hints(record)["body"]
        self.fields = tuple(field.name for field in dataclasses.fields(record))  # type: ignore[arg-type]
        self.columns = [table.c[name] for name in self.fields]

    @overload
    def __get__(self, view: None, owner: object) -> RecordKind[R]: ...
    @overload
    def __get__(self, view: Transaction, owner: object) -> RecordTable[R]: ...
    @overload
    def __get__(self, view: Reader, owner: object) -> TableView[R]: ...
    def __get__(self, view: Reader | None, owner: object) -> RecordKind[R] | TableView[R]:
        return self if view is None else self.of(view)

    def of(self, view: Reader) -> TableView[R]:
        """Return the records of this kind in a view."""
        return (RecordTable if isinstance(view, Transaction) else TableView)(view.connection, self)

    def place_of(self, record: R) -> str | tuple[float, str]:
        """Return the position from which `TableView.page` continues."""
        if self.newest_first:
            return record.create_time_s, record.name  # type: ignore[attr-defined]
        return record.name


class TableView(Generic[R]):
    """Reads of one kind of record, ordered by name or, for kinds ordered by age, newest first."""

    def __init__(self, connection: sa.Connection, kind: RecordKind[R]) -> None:
        self._connection, self._kind, self._table = connection, kind, kind.table

    def get(self, name: str) -> R | None:
        row = self._connection.execute(sa.select(*self._kind.columns).where(self._table.c.name == name)).one_or_none()
        return None if row is None else self._from_row(row)

    def require(self, name: str) -> R:
        """Return the record; raises NOT_FOUND."""
        if (record := self.get(name)) is None:
            raise failures.not_found(name)
        return record

    def require_free(self, name: str) -> None:
        """Check that there is no such record. Raises ALREADY_EXISTS."""
        taken = sa.select(self._table.c.name).where(self._table.c.name == name)
        if self._connection.execute(taken).one_or_none() is not None:
            message = f"{name} already exists"
            raise ServiceError(Reason.ERROR_REASON_ALREADY_EXISTS, message, metadata={"name": name})

    def page(self, after: After, limit: int, **filters: Filter) -> list[R]:
        """Return the next ``limit`` records after ``after``, the place of the last one seen.

        If ``after`` is None or empty, return the first ones.

        Each filter is a column and its value, or the values that are allowed.
        """
        query = self._behind(after, self._filtered(filters)).limit(limit)
        return [self._from_row(row) for row in self._connection.execute(query)]

    def bounded_page(self, after: After, limit: int, *, most_bytes: int, **filters: Filter) -> tuple[list[R], bool]:
        """Return a page as `page` does, and whether there are more records behind it.

        It ends before its bodies exceed ``most_bytes``, but has at least one record, if there is any.
        """
        # The sizes first: databases know them without reading the bodies, of which one may have megabytes.
        lengths = self._filtered(filters, sa.func.length(self._table.c.body))
        sizes = self._connection.execute(self._behind(after, lengths).limit(limit + 1)).scalars().all()
        num_within = sum(total <= most_bytes for total in itertools.accumulate(sizes[:limit]))
        size = max(1, num_within)
        return self.page(after, size, **filters), len(sizes) > size

    def all(self, **filters: Filter) -> list[R]:
        return [self._from_row(row) for row in self._connection.execute(self._filtered(filters))]

    def versions(self, **filters: Filter) -> dict[str, int]:
        """Return the version of each record by name, which shows what has changed without reading the bodies."""
        query = sa.select(self._table.c.name, self._table.c.version).where(*_conditions(self._table, filters))
        return {row.name: row.version for row in self._connection.execute(query)}

    def num_by_state(self) -> dict[int, int]:
        """Return how many records are in each state, without reading their bodies."""
        state = self._table.c.state
        query = sa.select(state, sa.func.count().label("num")).group_by(state)
        return {row.state: row.num for row in self._connection.execute(query)}

    def _behind(self, after: After, query: sa.Select[Any]) -> sa.Select[Any]:
        if not after:
            return query
        if isinstance(after, str):
            return query.where(self._table.c.name > after)
        time_s, name = after
        made = self._table.c.create_time_s
        return query.where(sa.or_(made < time_s, sa.and_(made == time_s, self._table.c.name < name)))

    def _filtered(self, filters: dict[str, Filter], *columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
        """Return a query for ``columns``, or for all of the record, in the order of the kind."""
        query = sa.select(*(columns or self._kind.columns)).where(*_conditions(self._table, filters))
        if self._kind.newest_first:
            return query.order_by(self._table.c.create_time_s.desc(), self._table.c.name.desc())
        return query.order_by(self._table.c.name)

    def _from_row(self, row: sa.Row[Any]) -> R:
        values = dict(zip(self._kind.fields, row, strict=True))
        values["body"] = self._kind.body.FromString(values["body"])
        return self._kind.record(**values)


class RecordTable(TableView[R]):
    """Reads and changes of one kind of record."""

    def insert(self, record: R) -> R:
        """Insert the record; return it with a version that no record of its name has had. Raises ALREADY_EXISTS."""
        # Checked first: a failed statement would end the whole transaction of PostgreSQL. There is no other writer.
        self.require_free(record.name)
        first = dataclasses.replace(record, version=record.version + self._gone_version())  # type: ignore[type-var]
        self._connection.execute(sa.insert(self._table).values(self._to_row(first)))
        if self._kind.kept_per_cluster is not None:
            self._forget_oldest(self._kind.kept_per_cluster, record)
        return first

    def update(self, record: R) -> R:
        """Update the record; return it at its next version. Raises NOT_FOUND, or ETAG_MISMATCH if it is outdated."""
        newer = dataclasses.replace(record, version=record.version + 1)  # type: ignore[type-var]
        same = sa.and_(self._table.c.name == record.name, self._table.c.version == record.version)
        done = self._connection.execute(sa.update(self._table).where(same).values(self._to_row(newer)))
        if not done.rowcount:
            present = etag_of(self.require(record.name))
            raise failures.etag_mismatch(record.name, given=etag_of(record), present=present)
        return newer

    def delete(self, name: str) -> None:
        """Delete the record; raises NOT_FOUND."""
        if not self._delete(self._table.c.name == name):
            raise failures.not_found(name)

    def delete_all(self, **filters: Filter) -> int:
        """Delete the matching records and return their number."""
        return self._delete(*_conditions(self._table, filters))

    def _delete(self, *conditions: sa.ColumnElement[bool]) -> int:
        newest = sa.select(sa.func.max(self._table.c.version)).where(*conditions)
        version = self._connection.execute(newest).scalar_one_or_none()
        if version is None:
            return 0
        gone = records.gone_versions
        if version > self._gone_version():
            self._connection.execute(sa.delete(gone).where(gone.c.table_name == self._table.name))
            self._connection.execute(sa.insert(gone).values(table_name=self._table.name, version=version))
        return self._connection.execute(sa.delete(self._table).where(*conditions)).rowcount

    def _forget_oldest(self, num_kept: int, newest: R) -> None:
        """Delete the oldest records of a cluster, but neither ``newest`` nor any record that is not final.

        Either may have an older time than all others: clocks are set back, and leaders have different clocks.
        """
        columns = self._table.c
        of_cluster = columns.cluster == newest.cluster  # type: ignore[attr-defined]
        times = sa.select(columns.create_time_s).where(of_cluster).order_by(columns.create_time_s.desc())
        oldest_kept_s = self._connection.execute(times.limit(1).offset(num_kept - 1)).scalar_one_or_none()
        if oldest_kept_s is not None:
            is_old = sa.and_(of_cluster, columns.create_time_s < oldest_kept_s, columns.name != newest.name)
            is_final = columns.state.in_(self._kind.final_states)
            self._connection.execute(sa.delete(self._table).where(is_old, is_final))

    def _gone_version(self) -> int:
        gone = records.gone_versions
        query = sa.select(gone.c.version).where(gone.c.table_name == self._table.name)
        return self._connection.execute(query).scalar_one_or_none() or 0

    def _to_row(self, record: R) -> dict[str, Any]:
        row = {name: getattr(record, name) for name in self._kind.fields}
        row["body"] = row["body"].SerializeToString(deterministic=True)
        return row


class PlanDocumentView:
    """Plan documents in canonical JSON, stored apart from their plans because they are large."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def get(self, name: str) -> bytes | None:
        table = records.plan_documents
        return self._connection.execute(sa.select(table.c.content).where(table.c.name == name)).scalar_one_or_none()


class PlanDocumentTable(PlanDocumentView):
    """Reads and changes of plan documents."""

    def put(self, name: str, content: bytes) -> None:
        """Insert or replace the document."""
        self.delete(name)
        self._connection.execute(sa.insert(records.plan_documents).values(name=name, content=content))

    def delete(self, name: str) -> None:
        """Delete the document; does nothing if there is none."""
        table = records.plan_documents
        self._connection.execute(sa.delete(table).where(table.c.name == name))


def _conditions(table: sa.Table, filters: dict[str, Filter]) -> Sequence[sa.ColumnElement[bool]]:
    return [
        table.c[name] == value if isinstance(value, str | int) else table.c[name].in_(list(value))
        for name, value in filters.items()
    ]


KEPT_S = 24 * 3600.0  # as docs/api.md documents


class RequestTable:
    """Answers to the requests of the last 24 hours, each stored in the transaction that carried out the request."""

    def __init__(self, connection: sa.Connection, *, now_s: float) -> None:
        self._connection = connection
        self._now_s = now_s

    def replay(self, method: str, request_id: str, fingerprint: str) -> bytes | None:
        """Return the answer to an earlier equal request, or None if there was none or the request has no id.

        Args:
            method: such as ``/hetis.v1.ClusterService/CreateCluster``.
            request_id: the request's id; empty if the caller sent none.
            fingerprint: a text that is equal for equal requests.

        Raises:
            ServiceError: REQUEST_ID_REUSED.
        """
        if not request_id:
            return None
        table = records.requests
        query = sa.select(table.c.method, table.c.fingerprint, table.c.response).where(
            table.c.request_id == request_id, table.c.end_time_s > self._now_s
        )
        row = self._connection.execute(query).one_or_none()
        if row is None:
            return None
        if (row.method, row.fingerprint) != (method, fingerprint):
            message = f"request_id {request_id} was used for another request; use a new one"
            raise ServiceError(Reason.ERROR_REASON_REQUEST_ID_REUSED, message, metadata={"request_id": request_id})
        return bytes(row.response)

    def remember(self, method: str, request_id: str, fingerprint: str, response: bytes) -> None:
        """Store the answer to a request that was just carried out, and forget old answers."""
        if not request_id:
            return
        table = records.requests
        self._connection.execute(sa.delete(table).where(table.c.end_time_s <= self._now_s))
        self._connection.execute(
            sa.insert(table).values(
                request_id=request_id,
                method=method,
                fingerprint=fingerprint,
                response=response,
                end_time_s=self._now_s + KEPT_S,
            )
        )


class Reader:
    """A consistent view of all tables. It belongs to one thread, and is unusable once its work is done."""

    clusters = RecordKind(records.clusters, ClusterRecord)
    nodes = RecordKind(records.nodes, NodeRecord)
    profiles = RecordKind(records.profiles, ProfileRecord)
    plans = RecordKind(records.plans, PlanRecord, newest_first=True)
    replicas = RecordKind(records.replicas, ReplicaRecord)
    redispatches = RecordKind(
        records.redispatches,
        RedispatchRecord,
        newest_first=True,
        kept_per_cluster=KEPT_REDISPATCHES,
        final_states=records.FINAL_REDISPATCHES,
    )
    traffic = RecordKind(records.traffic, TrafficRecord)

    def __init__(self, connection: sa.Connection) -> None:
        self.connection = connection
        self.audit = AuditLog(connection)
        self.plan_documents = PlanDocumentView(connection)


class Transaction(Reader):
    """A view whose changes are made all together or not at all."""

    plan_documents: PlanDocumentTable

    def __init__(self, connection: sa.Connection, *, now_s: float) -> None:
        super().__init__(connection)
        self.plan_documents = PlanDocumentTable(connection)
        self.requests = RequestTable(connection, now_s=now_s)
        self.now_s = now_s
