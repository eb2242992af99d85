"""The stored records, one class and one table per kind, as the newest migration creates them; a test compares the two.

Bodies are messages of the API: the caller's input and what was derived from it. Fields that a resource has besides its
body (states that live in memory, times, etags) are added by `hetis.planner.resources`. Names sort by their bytes in
every database, whereas PostgreSQL's default is the order of a language.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

from sqlalchemy import BigInteger, Boolean, Column, Double, Index, Integer, LargeBinary, MetaData, Table, Text
from sqlalchemy.types import TypeEngine

from hetis.v1 import cluster_pb2, plan_pb2, profile_pb2, redispatch_pb2, replica_pb2, traffic_pb2


class Record(Protocol):
    """The fields of every record: its resource name, and its version, which each update increments."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...


def etag_of(record: Record | None) -> str:
    """Return the value that conditional changes compare. None stands for a resource that is not stored yet."""
    return f"v{record.version if record else 0}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRecord:
    """A cluster. ``body`` has the whole document, the policy, and counts derived from the document."""

    name: str
    body: cluster_pb2.Cluster
    version: int = 1
    active_plan: str = ""  # the active plan, even while being activated; empty if none
    earlier_plan: str = ""  # the target of RollbackPlan; empty if none
    create_time_s: float
    update_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """A declared node whose agent has connected, or any node that was drained.

    ``body`` has the inventory, agent_version and times.
    """

    name: str
    cluster: str
    body: cluster_pb2.Node
    draining: bool = False
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRecord:
    """A profile. ``body`` has the whole document and what is derived from it."""

    name: str
    gpu_type: str
    body: profile_pb2.Profile
    version: int = 1
    create_time_s: float
    update_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    """A plan. ``body`` has everything but the Plan document, which is in ``plan_documents``."""

    name: str
    cluster: str
    body: plan_pb2.Plan
    state: plan_pb2.PlanState.ValueType
    activation: plan_pb2.ActivationState.ValueType
    version: int = 1
    create_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRecord:
    """A replica, until it is stopped."""

    name: str
    cluster: str
    plan: str  # empty once the replica belongs to no plan and is stopping
    body: replica_pb2.Replica
    state: replica_pb2.ReplicaState.ValueType
    generation: int = 0
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RedispatchRecord:
    """A re-dispatch, in progress or ended."""

    name: str
    cluster: str
    replica: str
    body: redispatch_pb2.Redispatch
    state: redispatch_pb2.RedispatchState.ValueType
    version: int = 1
    create_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficRecord:
    """A window of measured traffic, which never changes."""

    name: str  # `clusters/{cluster}/traffic/{seconds}/{start}/{model}`
    cluster: str
    body: traffic_pb2.TrafficWindow
    version: int = 1


_Redispatch = redispatch_pb2.RedispatchState
FINAL_REDISPATCHES = frozenset(
    {
        _Redispatch.REDISPATCH_STATE_ADVISED,
        _Redispatch.REDISPATCH_STATE_DONE,
        _Redispatch.REDISPATCH_STATE_ABORTED,
    }
)
"""The states in which a re-dispatch stays for ever."""

NAME = Text().with_variant(Text(collation="C"), "postgresql")

metadata = MetaData()


def _column(name: str, kind: TypeEngine[Any] | type[TypeEngine[Any]]) -> Column[Any]:
    return Column(name, kind, nullable=False)


_COLUMNS: dict[str, TypeEngine[Any] | type[TypeEngine[Any]]] = {
    **dict.fromkeys(("cluster", "replica"), NAME),
    **dict.fromkeys(("create_time_s", "update_time_s"), Double),
    **dict.fromkeys(("state", "activation"), Integer),
    **dict.fromkeys(("version", "generation"), BigInteger),
    "draining": Boolean,
    "body": LargeBinary,
}
"""The fields of records whose columns are not text, with the types of these columns."""


def _table(name: str, record: type[Any], *indices: Index) -> Table:
    """Return a table with a column for each field of a record."""
    own = [_column(field.name, _COLUMNS.get(field.name, Text)) for field in fields(record) if field.name != "name"]
    return Table(name, metadata, Column("name", NAME, primary_key=True), *own, *indices)


leadership = Table(
    "leadership",
    metadata,
    Column("id", Integer, primary_key=True),  # there is only one row
    _column("epoch", BigInteger),
    _column("holder", Text),
    _column("lease_end_s", Double),  # Unix time of the database server; 0 if no planner holds the lease
)
clusters = _table("clusters", ClusterRecord)
nodes = _table("nodes", NodeRecord, Index("nodes_of_cluster", "cluster", "name"))
profiles = _table("profiles", ProfileRecord, Index("profiles_of_type", "gpu_type", "name"))
plans = _table(
    "plans",
    PlanRecord,
    Index("plans_by_age", "create_time_s", "name"),
    Index("plans_of_cluster", "cluster", "create_time_s", "name"),
)
plan_documents = Table(
    "plan_documents", metadata, Column("name", NAME, primary_key=True), _column("content", LargeBinary)
)
replicas = _table("replicas", ReplicaRecord, Index("replicas_of_cluster", "cluster", "name"))
redispatches = _table(
    "redispatches", RedispatchRecord, Index("redispatches_of_cluster", "cluster", "create_time_s", "name")
)
traffic = _table("traffic", TrafficRecord, Index("traffic_of_cluster", "cluster", "name"))
requests = Table(
    "requests",
    metadata,
    Column("request_id", Text, primary_key=True),
    _column("method", Text),
    _column("fingerprint", Text),
    _column("response", LargeBinary),
    _column("end_time_s", Double),
    Index("requests_by_end", "end_time_s"),
)
# Per table, the highest version of any deleted record. A record that reuses a name starts above it, so that no etag is
# used twice.
gone_versions = Table(
    "gone_versions", metadata, Column("table_name", Text, primary_key=True), _column("version", BigInteger)
)
audit = Table(
    "audit",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    _column("time_s", Double),
    _column("epoch", BigInteger),
    *(_column(name, Text) for name in ("caller", "role", "method", "resource", "request_id", "plan", "outcome")),
    _column("times", BigInteger),
    _column("hash", Text),
)
