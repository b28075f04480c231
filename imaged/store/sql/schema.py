"""The tables, with constraints as the last defence of invariants; migrations/ creates them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

metadata = sa.MetaData()


def partial_index(name: str, *columns: sa.Column[Any], where: str, unique: bool = False) -> None:
    """An index of those rows of which `where` is true."""
    found = sa.text(where)
    sa.Index(name, *columns, unique=unique, sqlite_where=found, postgresql_where=found)


#: API keys (as keyed hashes), their money, rate bucket, and `tag`: virtual time of fair queueing.
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

#: Double-entry of credits, append-only. A job has one reserve, then one settle or release.
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
partial_index("one_reserve_a_job", ledger.c.job_id, where="kind = 'reserve'", unique=True)
partial_index("one_end_a_job", ledger.c.job_id, where="kind IN ('settle', 'release')", unique=True)
partial_index("charges_by_key", ledger.c.key_id, ledger.c.amount_micros, where="kind = 'settle'")

#: One row per job, until it expires.
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
    sa.Column("made_in", sa.Text),  # of a picture that is made again: see jobs.Submission
    sa.CheckConstraint(
        "state IN ('QUEUED', 'PROCESSING', 'PARKED', 'COMPLETED', 'FAILED', 'CANCELLED')",
        name="state_known",
    ),
    sa.CheckConstraint("(state = 'PROCESSING') = (worker_id IS NOT NULL)", name="held_if_running"),
    sa.CheckConstraint("cost_micros > 0", name="cost_positive"),
)
partial_index("queued_in_order", jobs.c.tag, where="state = 'QUEUED'")
partial_index("queued_by_model", jobs.c.model, jobs.c.tag, where="state = 'QUEUED'")
partial_index("running_by_worker", jobs.c.worker_id, where="state = 'PROCESSING'")
partial_index(
    "one_job_an_idempotency_key",
    jobs.c.key_id,
    jobs.c.idempotency_key,
    where="idempotency_key IS NOT NULL",
    unique=True,
)
sa.Index("by_expiry", jobs.c.expires_at)
sa.Index("by_key", jobs.c.key_id, jobs.c.created_at)

#: Requests and costs, copied from `jobs` before a row there is deleted.
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

#: Progress of running jobs: UNet calls and the newest preview, a JPEG. Written by heartbeats about
#: once a second; may be lost.
progress = sa.Table(
    "progress",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("calls_done", sa.Integer, nullable=False),
    sa.Column("preview", sa.LargeBinary),
    sa.Column("preview_call", sa.Integer),
)

#: Leases: one per worker, for all its jobs.
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

#: Checkpoints that workers are loading, or were when they died.
loads = sa.Table(
    "loads",
    metadata,
    sa.Column("worker_id", sa.Text, primary_key=True),
    sa.Column("weights", sa.Text, nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
)

#: Models that were added to the built-in ones.
models = sa.Table(
    "models",
    metadata,
    sa.Column("slug", sa.Text, primary_key=True),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("checkpoint", sa.Text, nullable=False),
    sa.Column("price_micros", sa.BigInteger, nullable=False),
    sa.Column("added_at", sa.Float, nullable=False),
    sa.Column("entry", sa.JSON),  # its table as in models.toml, see catalogue/toml.py
)

#: Webhook subscriptions of keys. Secrets are derived, see subscriptions.secret_of.
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

#: Transactional outbox: one row per webhook and ended job. Delivery leases a row by its `due_at`.
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
partial_index("outbox_in_order", outbox.c.due_at, where="state = 'WAITING'")
sa.Index("outbox_by_end", outbox.c.ended_at)
