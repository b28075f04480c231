"""Jobs that rest, a state of their own; history tells what was charged."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

BEFORE = "'QUEUED', 'PROCESSING', 'COMPLETED'"
AFTER = "'QUEUED', 'PROCESSING', 'PARKED', 'COMPLETED'"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("draft", sa.JSON(), nullable=True))
    op.execute(
        "UPDATE history SET cost_micros = 0 WHERE state != 'COMPLETED'"
    )  # it was not charged
    if op.get_bind().dialect.name == "sqlite":
        _rebuild()
        return
    op.drop_constraint("state_known", "jobs", type_="check")
    states = f"state IN ({AFTER}, 'FAILED', 'CANCELLED')"
    op.create_check_constraint("state_known", "jobs", states)


def _rebuild() -> None:
    """SQLite changes no constraint: the table is made anew, under its old name."""
    bind = op.get_bind()
    of_jobs = "FROM sqlite_master WHERE tbl_name = 'jobs' AND sql IS NOT NULL AND type ="
    [table] = bind.exec_driver_sql(f"SELECT sql {of_jobs} 'table'").scalars()
    indexes = bind.exec_driver_sql(f"SELECT sql, name {of_jobs} 'index'").all()
    assert table.count(BEFORE) == 1
    bind.exec_driver_sql("ALTER TABLE jobs RENAME TO jobs_before")
    for _, name in indexes:
        op.drop_index(name, "jobs_before")
    bind.exec_driver_sql(table.replace(BEFORE, AFTER))
    bind.exec_driver_sql("INSERT INTO jobs SELECT * FROM jobs_before")
    bind.exec_driver_sql("DROP TABLE jobs_before")
    for sql, _ in indexes:
        bind.exec_driver_sql(sql)
