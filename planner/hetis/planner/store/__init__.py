"""The store of the planning service: records in SQLite or PostgreSQL, changed by one durable transaction at a time."""

from hetis.planner.store.audit import AuditedChange, AuditFilter, AuditLine
from hetis.planner.store.lease import Lease
from hetis.planner.store.opening import StoreError
from hetis.planner.store.records import (
    ClusterRecord,
    NodeRecord,
    PlanRecord,
    ProfileRecord,
    RedispatchRecord,
    ReplicaRecord,
    TrafficRecord,
    etag_of,
)
from hetis.planner.store.store import Store
from hetis.planner.store.tables import Reader, Transaction

__all__ = [
    "AuditFilter",
    "AuditLine",
    "AuditedChange",
    "ClusterRecord",
    "Lease",
    "NodeRecord",
    "PlanRecord",
    "ProfileRecord",
    "Reader",
    "RedispatchRecord",
    "ReplicaRecord",
    "Store",
    "StoreError",
    "TrafficRecord",
    "Transaction",
    "etag_of",
]
