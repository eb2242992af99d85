"""The first tables.

A migration is never changed after a release: it describes the tables of its time, not those in ``records.py``.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.types import TypeEngine

revision = "v0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    name = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

    def column(title: str, kind: TypeEngine[Any]) -> sa.Column[Any]:
        return sa.Column(title, kind, nullable=False)

    def names() -> sa.Column[str]:
        return sa.Column("name", name, primary_key=True)

    body, version = ("body", sa.LargeBinary()), ("version", sa.BigInteger())
    cluster, state = ("cluster", name), ("state", sa.Integer())
    seconds: TypeEngine[Any] = sa.Double()
    created, updated = ("create_time_s", seconds), ("update_time_s", seconds)
    leadership = op.create_table(
        "leadership",
        sa.Column("id", sa.Integer(), primary_key=True),
        column("epoch", sa.BigInteger()),
        column("holder", sa.Text()),
        column("lease_end_s", sa.Double()),
    )
    op.bulk_insert(leadership, [{"id": 1, "epoch": 0, "holder": "", "lease_end_s": 0.0}])
    tables: dict[str, list[tuple[str, TypeEngine[Any]]]] = {
        "clusters": [("active_plan", sa.Text()), ("earlier_plan", sa.Text()), body, version, created, updated],
        "nodes": [cluster, ("draining", sa.Boolean()), body, version],
        "profiles": [("gpu_type", sa.Text()), body, version, created, updated],
        "plans": [cluster, state, ("activation", sa.Integer()), body, version, created],
        "plan_documents": [("content", sa.LargeBinary())],
        "replicas": [cluster, ("plan", sa.Text()), state, ("generation", sa.BigInteger()), body, version],
        "redispatches": [cluster, ("replica", name), state, body, version, created],
    }
    for title, columns in tables.items():
        op.create_table(title, names(), *(column(*each) for each in columns))
    op.create_table(
        "requests",
        sa.Column("request_id", sa.Text(), primary_key=True),
        column("method", sa.Text()),
        column("fingerprint", sa.Text()),
        column("response", sa.LargeBinary()),
        column("end_time_s", seconds),
    )
    op.create_index("nodes_of_cluster", "nodes", ["cluster", "name"])
    op.create_index("profiles_of_type", "profiles", ["gpu_type", "name"])
    op.create_index("plans_by_age", "plans", ["create_time_s", "name"])
    op.create_index("plans_of_cluster", "plans", ["cluster", "create_time_s", "name"])
    op.create_index("replicas_of_cluster", "replicas", ["cluster", "name"])
    op.create_index("redispatches_of_cluster", "redispatches", ["cluster", "create_time_s", "name"])
    op.create_index("requests_by_end", "requests", ["end_time_s"])
