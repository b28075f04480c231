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
sa.Index(
    "charges_by_key",
    ledger.c.key_id,
    ledger.c.amount_micros,
    sqlite_where=sa.text("kind = 'settle'"),
    postgresql_where=sa.text("kind = 'settle'"),
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
    sa.Column("idempotency_key", sa.Text),
    sa.Column("fingerprint", sa.Text),
    sa.Column("cancel_at", sa.Float),
    sa.Column("draft", sa.JSON),  # of a job that is to rest: see jobs.Draft
    sa.Column("made_in", sa.Text),  # of a picture that is made again: see jobs.Terms
    sa.CheckConstraint(
        "state IN ('QUEUED', 'PROCESSING', 'PARKED', 'COMPLETED', 'FAILED', 'CANCELLED')",
        name="state_known",
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
    "queued_by_model",
    jobs.c.model,
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
sa.Index(
    "one_job_an_idempotency_key",
    jobs.c.key_id,
    jobs.c.idempotency_key,
    unique=True,
    sqlite_where=sa.text("idempotency_key IS NOT NULL"),
    postgresql_where=sa.text("idempotency_key IS NOT NULL"),
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

#: UNet calls made so far and the newest preview of a running job, a JPEG made after the call
#: `preview_call`; written about once a second, may be lost.
progress = sa.Table(
    "progress",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("calls_done", sa.Integer, nullable=False),
    sa.Column("preview", sa.LargeBinary),
    sa.Column("preview_call", sa.Integer),
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
    sa.Column("models", sa.JSON),  # slug -> state of its checkpoint on this worker
)

#: What workers are loading, or died loading.
loads = sa.Table(
    "loads",
    metadata,
    sa.Column("worker_id", sa.Text, primary_key=True),
    sa.Column("weights", sa.Text, nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
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
    sa.Column("entry", sa.JSON),  # its table as in models.toml, see offers.py
)

#: Where a key wants to hear of its jobs' ends. Its secret is derived, see webhooks.secret_of.
webhooks = sa.Table(
    "webhooks",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("key_id", sa.Integer, sa.ForeignKey("api_keys.id"), nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("types", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("disabled_at", sa.Float),
)
sa.Index("webhooks_by_key", webhooks.c.key_id)

#: One row for each webhook that wants to hear of a job's end, written in the end's transaction.
#: A dispatcher that takes a row moves `due_at` on: that is its lease.
outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("webhook_id", sa.Text, sa.ForeignKey("webhooks.id"), nullable=False),
    sa.Column("job_id", sa.Text, nullable=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("facts", sa.JSON, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("due_at", sa.Float, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
    sa.Column("status", sa.Integer),
    sa.Column("problem", sa.Text),
    sa.CheckConstraint("state IN ('WAITING', 'DELIVERED', 'DEAD')", name="outbox_state_known"),
    sa.UniqueConstraint("webhook_id", "job_id", name="one_event_a_job_and_webhook"),
)
sa.Index(
    "outbox_in_order",
    outbox.c.due_at,
    sqlite_where=sa.text("state = 'WAITING'"),
    postgresql_where=sa.text("state = 'WAITING'"),
)
sa.Index("outbox_by_end", outbox.c.ended_at)
