"""The audit log. A downgrade below this version deletes it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "v0003"
down_revision = "v0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("number", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("time_s", sa.Double(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        *(
            sa.Column(name, sa.Text(), nullable=False)
            for name in ("caller", "role", "method", "resource", "request_id", "plan", "outcome")
        ),
        sa.Column("times", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("audit")
