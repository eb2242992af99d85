"""The tables as seen by one transaction."""

from __future__ import annotations

import sqlalchemy as sa

import hetis.planner.store.records as records
import hetis.planner.store.schema as schema
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.store.audit import AuditLog
from hetis.planner.store.tables import PlanDocumentTable, PlanDocumentView, RecordTable, RedispatchTable, TableView

KEPT_S = 24 * 3600.0  # see docs/api.md


class RequestTable:
    """Answers to requests of the last 24 hours, written in the transaction that carried out the request."""

    def __init__(self, connection: sa.Connection, *, now_s: float) -> None:
        self._connection = connection
        self._now_s = now_s

    def replay(self, method: str, request_id: str, fingerprint: str) -> bytes | None:
        """Return the answer that the same request got, or None if it was not done before or gave no id.

        Args:
            method: such as ``/hetis.v1.ClusterService/CreateCluster``.
            request_id: empty if the caller gave none.
            fingerprint: equal for equal requests.

        Raises:
            ServiceError: REQUEST_ID_REUSED.
        """
        if not request_id:
            return None
        table = schema.requests
        query = sa.select(table.c.method, table.c.fingerprint, table.c.response).where(
            table.c.request_id == request_id, table.c.end_time_s > self._now_s
        )
        row = self._connection.execute(query).one_or_none()
        if row is None:
            return None
        if (row.method, row.fingerprint) != (method, fingerprint):
            raise ServiceError(
                Reason.ERROR_REASON_REQUEST_ID_REUSED,
                f"request_id {request_id} was used for another request; take a new one",
                metadata={"request_id": request_id},
            )
        return bytes(row.response)

    def remember(self, method: str, request_id: str, fingerprint: str, response: bytes) -> None:
        """Store the answer to a request that has just been done, and forget old ones."""
        if not request_id:
            return
        table = schema.requests
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
    """A consistent view of all tables. It belongs to one thread and is unusable once its work is done."""

    clusters: TableView[records.ClusterRecord]
    nodes: TableView[records.NodeRecord]
    profiles: TableView[records.ProfileRecord]
    plans: TableView[records.PlanRecord]
    plan_documents: PlanDocumentView
    replicas: TableView[records.ReplicaRecord]
    redispatches: TableView[records.RedispatchRecord]
    audit: AuditLog

    def __init__(self, connection: sa.Connection) -> None:
        self.audit = AuditLog(connection)
        self.clusters = TableView(connection, schema.clusters, records.ClusterRecord)
        self.nodes = TableView(connection, schema.nodes, records.NodeRecord)
        self.profiles = TableView(connection, schema.profiles, records.ProfileRecord)
        self.plans = TableView(connection, schema.plans, records.PlanRecord, newest_first=True)
        self.plan_documents = PlanDocumentView(connection)
        self.replicas = TableView(connection, schema.replicas, records.ReplicaRecord)
        self.redispatches = TableView(connection, schema.redispatches, records.RedispatchRecord, newest_first=True)


class Transaction(Reader):
    """A view whose changes are made all together or not at all."""

    clusters: RecordTable[records.ClusterRecord]
    nodes: RecordTable[records.NodeRecord]
    profiles: RecordTable[records.ProfileRecord]
    plans: RecordTable[records.PlanRecord]
    plan_documents: PlanDocumentTable
    replicas: RecordTable[records.ReplicaRecord]
    redispatches: RedispatchTable
    requests: RequestTable

    def __init__(self, connection: sa.Connection, *, now_s: float) -> None:
        self.audit = AuditLog(connection)
        self.clusters = RecordTable(connection, schema.clusters, records.ClusterRecord)
        self.nodes = RecordTable(connection, schema.nodes, records.NodeRecord)
        self.profiles = RecordTable(connection, schema.profiles, records.ProfileRecord)
        self.plans = RecordTable(connection, schema.plans, records.PlanRecord, newest_first=True)
        self.plan_documents = PlanDocumentTable(connection)
        self.replicas = RecordTable(connection, schema.replicas, records.ReplicaRecord)
        self.redispatches = RedispatchTable(
            connection, schema.redispatches, records.RedispatchRecord, newest_first=True
        )
        self.requests = RequestTable(connection, now_s=now_s)
        self.now_s = now_s
