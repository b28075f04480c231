"""All that is said of a model; which checkpoints lie on which worker."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("models", sa.Column("entry", sa.JSON(), nullable=True))
    op.add_column("workers", sa.Column("models", sa.JSON(), nullable=True))
    op.create_index(
        "queued_by_model",
        "jobs",
        ["model", "tag"],
        unique=False,
        sqlite_where=sa.text("state = 'QUEUED'"),
        postgresql_where=sa.text("state = 'QUEUED'"),
    )
