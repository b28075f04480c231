"""Pictures that are made again, in the types of numbers of their receipts."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("made_in", sa.Text, nullable=True))
