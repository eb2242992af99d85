"""The tables as the newest migration leaves them; a test compares the two.

Names sort by their bytes in every database, whereas PostgreSQL's default is the order of a language.
"""

from __future__ import annotations

from typing import Any

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
