"""Checkpoints that are being loaded, so that one is known that ends its workers."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "loads",
        sa.Column("worker_id", sa.Text, primary_key=True),
        sa.Column("weights", sa.Text, nullable=False),
        sa.Column("started_at", sa.Float, nullable=False),
    )
