"""The tables. Constraints say what must never be; migrations/ says how they came about."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

#: A customer's key, kept as a keyed hash, and its money. `tag` is its place in the fair order.
api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False, unique=True),
    sa.Column("hint", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("revoked_at", sa.Float),
    sa.Column("balance_micros", sa.BigInteger, nullable=False),
    sa.Column("reserved_micros", sa.BigInteger, nullable=False),
    sa.Column("rpm", sa.Integer, nullable=False),
    sa.Column("bucket", sa.Float, nullable=False),
    sa.Column("bucket_at", sa.Float, nullable=False),
    sa.Column("tag", sa.Float, nullable=False),
    sa.Column("models", sa.JSON),  # the slugs it may use; null: all
    sa.CheckConstraint("reserved_micros >= 0", name="reserved_not_negative"),
    sa.CheckConstraint("balance_micros >= reserved_micros", name="nothing_overspent"),
)

#: Every movement of money, append-only. A job has one reserve, then one settle or release.
ledger = sa.Table(
    "ledger",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key_id", sa.Integer, sa.ForeignKey("api_keys.id"), nullable=False),
    sa.Column("job_id", sa.Text),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("amount_micros", sa.BigInteger, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.CheckConstraint("kind IN ('grant', 'reserve', 'settle', 'release')", name="kind_known"),
    sa.CheckConstraint("(kind = 'grant') = (job_id IS NULL)", name="job_unless_grant"),
)
sa.Index(
    "one_reserve_a_job",
    ledger.c.job_id,
    unique=True,
    sqlite_where=sa.text("kind = 'reserve'"),
    postgresql_where=sa.text("kind = 'reserve'"),
)
sa.Index(
    "one_end_a_job",
    ledger.c.job_id,
    unique=True,
    sqlite_where=sa.text("kind IN ('settle', 'release')"),
    postgresql_where=sa.text("kind IN ('settle', 'release')"),
)

#: One row a job until it expires.
jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("key_id", sa.Integer, sa.ForeignKey("api_keys.id"), nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("params", sa.JSON, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("tag", sa.Float, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("worker_id", sa.Text),
    sa.Column("cost_micros", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("finished_at", sa.Float),
    sa.Column("expires_at", sa.Float),
    sa.Column("reason", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("result", sa.JSON),
    sa.Column("remaining_micros", sa.BigInteger),
    sa.CheckConstraint(
        "state IN ('QUEUED', 'PROCESSING', 'COMPLETED', 'FAILED', 'CANCELLED')", name="state_known"
    ),
    sa.CheckConstraint("(state = 'PROCESSING') = (worker_id IS NOT NULL)", name="held_if_running"),
    sa.CheckConstraint("cost_micros > 0", name="cost_positive"),
)
sa.Index(
    "queued_in_order",
    jobs.c.tag,
    sqlite_where=sa.text("state = 'QUEUED'"),
    postgresql_where=sa.text("state = 'QUEUED'"),
)
sa.Index(
    "running_by_worker",
    jobs.c.worker_id,
    sqlite_where=sa.text("state = 'PROCESSING'"),
    postgresql_where=sa.text("state = 'PROCESSING'"),
)
sa.Index("by_expiry", jobs.c.expires_at)
sa.Index("by_key", jobs.c.key_id, jobs.c.created_at)

#: What was asked for and what it cost, copied from `jobs` when a row there is forgotten.
history = sa.Table(
    "history",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("key_id", sa.Integer, sa.ForeignKey("api_keys.id"), nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("params", sa.JSON, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("cost_micros", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("finished_at", sa.Float),
    sa.Column("error", sa.Text),
)
sa.Index("history_by_key", history.c.key_id, history.c.created_at)
sa.Index("history_by_age", history.c.created_at)

#: UNet calls made so far; written about once a second, may be lost.
progress = sa.Table(
    "progress",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("calls_done", sa.Integer, nullable=False),
)

#: One lease a worker, however many jobs it holds.
workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),
    sa.Column("ticked_at", sa.Float, nullable=False),
    sa.Column("checkpoint", sa.Text),
)

#: Checkpoints that were added to the built-in ones.
models = sa.Table(
    "models",
    metadata,
    sa.Column("slug", sa.Text, primary_key=True),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("checkpoint", sa.Text, nullable=False),
    sa.Column("price_micros", sa.BigInteger, nullable=False),
    sa.Column("added_at", sa.Float, nullable=False),
)
