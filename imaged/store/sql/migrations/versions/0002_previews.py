"""Progress carries a preview: a small JPEG and the UNet call after which it was made."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("progress", sa.Column("preview", sa.LargeBinary(), nullable=True))
    op.add_column("progress", sa.Column("preview_call", sa.Integer(), nullable=True))
