"""What a key was charged so far, without reading everybody's movements."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_index(
        "charges_by_key",
        "ledger",
        ["key_id", "amount_micros"],
        unique=False,
        sqlite_where=sa.text("kind = 'settle'"),
        postgresql_where=sa.text("kind = 'settle'"),
    )
