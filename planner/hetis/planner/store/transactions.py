"""The tables as seen by one transaction."""

from __future__ import annotations

import sqlalchemy as sa

import hetis.planner.store.records as records
import hetis.planner.store.schema as schema
from hetis.planner.store.audit import AuditLog
from hetis.planner.store.requests import RequestTable
from hetis.planner.store.tables import PlanDocumentTable, PlanDocumentView, RecordTable, RedispatchTable, TableView


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
