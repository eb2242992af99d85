"""Windows of measured traffic. A downgrade below this version deletes them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "v0004"
down_revision = "v0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    name = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.create_table(
        "traffic",
        sa.Column("name", name, primary_key=True),
        sa.Column("cluster", name, nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Index("traffic_of_cluster", "cluster", "name"),
    )


def downgrade() -> None:
    op.drop_table("traffic")
