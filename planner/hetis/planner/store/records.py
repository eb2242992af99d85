"""The stored records, one class and one table per kind, as the newest migration leaves them; a test compares the two.

Bodies are messages of the API: the caller's input and what was found. Fields that a resource shows besides its body
(states that live in memory, times, etags) are added by `hetis.planner.resources`. Names sort by their bytes in every
database, whereas PostgreSQL's default is the order of a language.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)
from sqlalchemy.types import TypeEngine

from hetis.v1 import cluster_pb2, plan_pb2, profile_pb2, redispatch_pb2, replica_pb2


class Record(Protocol):
    """The fields of every record: its resource name, and its version, which each update raises by one."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...


def etag_of(record: Record | None) -> str:
    """Return the value that conditional changes compare. None stands for a resource that is not stored yet."""
    return f"v{record.version if record else 0}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRecord:
    """A cluster: ``body`` has the whole document, the policy and the counts derived from the document."""

    name: str
    body: cluster_pb2.Cluster
    version: int = 1
    active_plan: str = ""  # active or being activated; empty if none
    earlier_plan: str = ""  # the target of RollbackPlan; empty if none
    create_time_s: float
    update_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """A node that an agent connected for, or that was drained: ``body`` has inventory, agent_version and times."""

    name: str
    cluster: str
    body: cluster_pb2.Node
    draining: bool = False
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRecord:
    """A profile: ``body`` has the whole document and what is derived from it."""

    name: str
    gpu_type: str
    body: profile_pb2.Profile
    version: int = 1
    create_time_s: float
    update_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    """A plan: ``body`` has everything but the Plan document, which is in ``plan_documents``."""

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
    plan: str  # empty once it belongs to no plan and is stopping
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


NAME = Text().with_variant(Text(collation="C"), "postgresql")

metadata = MetaData()


def _name() -> Column[str]:
    return Column("name", NAME, primary_key=True)


def _version() -> Column[int]:
    return Column("version", BigInteger, nullable=False)


def _required(name: str, kind: TypeEngine[Any] | type[TypeEngine[Any]]) -> Column[Any]:
    return Column(name, kind, nullable=False)


leadership = Table(
    "leadership",
    metadata,
    Column("id", Integer, primary_key=True),  # there is only one row
    _required("epoch", BigInteger),
    _required("holder", Text),
    _required("lease_end_s", Double),  # Unix time of the database server; 0 if nobody holds it
)
clusters = Table(
    "clusters",
    metadata,
    _name(),
    _required("active_plan", Text),
    _required("earlier_plan", Text),
    _required("body", LargeBinary),
    _version(),
    _required("create_time_s", Double),
    _required("update_time_s", Double),
)
nodes = Table(
    "nodes",
    metadata,
    _name(),
    _required("cluster", NAME),
    _required("draining", Boolean),
    _required("body", LargeBinary),
    _version(),
    Index("nodes_of_cluster", "cluster", "name"),
)
profiles = Table(
    "profiles",
    metadata,
    _name(),
    _required("gpu_type", Text),
    _required("body", LargeBinary),
    _version(),
    _required("create_time_s", Double),
    _required("update_time_s", Double),
    Index("profiles_of_type", "gpu_type", "name"),
)
plans = Table(
    "plans",
    metadata,
    _name(),
    _required("cluster", NAME),
    _required("state", Integer),
    _required("activation", Integer),
    _required("body", LargeBinary),
    _version(),
    _required("create_time_s", Double),
    Index("plans_by_age", "create_time_s", "name"),
    Index("plans_of_cluster", "cluster", "create_time_s", "name"),
)
plan_documents = Table("plan_documents", metadata, _name(), _required("content", LargeBinary))
replicas = Table(
    "replicas",
    metadata,
    _name(),
    _required("cluster", NAME),
    _required("plan", Text),
    _required("state", Integer),
    _required("generation", BigInteger),
    _required("body", LargeBinary),
    _version(),
    Index("replicas_of_cluster", "cluster", "name"),
)
redispatches = Table(
    "redispatches",
    metadata,
    _name(),
    _required("cluster", NAME),
    _required("replica", NAME),
    _required("state", Integer),
    _required("body", LargeBinary),
    _version(),
    _required("create_time_s", Double),
    Index("redispatches_of_cluster", "cluster", "create_time_s", "name"),
)
requests = Table(
    "requests",
    metadata,
    Column("request_id", Text, primary_key=True),
    _required("method", Text),
    _required("fingerprint", Text),
    _required("response", LargeBinary),
    _required("end_time_s", Double),
    Index("requests_by_end", "end_time_s"),
)
# Per table, the highest version of any deleted record. A record that reuses a name starts above it, so that no etag is
# used twice.
gone_versions = Table(
    "gone_versions",
    metadata,
    Column("table_name", Text, primary_key=True),
    _version(),
)
audit = Table(
    "audit",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    _required("time_s", Double),
    _required("epoch", BigInteger),
    *(_required(name, Text) for name in ("caller", "role", "method", "resource", "request_id", "plan", "outcome")),
    _required("times", BigInteger),
    _required("hash", Text),
)
