"""Transactional outbox of webhook events.

An event is inserted in the transaction that ends its job. Delivery leases events; after a crash the
lease runs out and the event is delivered again: at least once, with the same id.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from imaged.jobs import State
from imaged.store.sql.schema import jobs, outbox, webhooks
from imaged.store.webhooks.subscriptions import ANY_END, COMPLETED, FAILED, drop_waiting

WAITING = sa.text("outbox.state = 'WAITING'")  # literal, so that the partial index is used
LEASE_S = 30.0  # longer than an attempt
_FACTS = (
    *("id", "model", "state", "reason", "error", "cost_micros"),
    *("created_at", "started_at", "finished_at"),
    "remaining_micros",  # set if the job was charged
)


@dataclass(frozen=True)
class QueuedEvent:
    """A leased event; attempt: counts from 1."""

    id: str
    webhook_id: str
    key_id: int
    url: str
    type: str
    facts: Mapping[str, Any]
    attempt: int


def announce(connection: sa.Connection, job_ids: Collection[str], now: float) -> None:
    """Insert the events of ended jobs, in their transaction."""
    ended = connection.execute(
        sa.select(webhooks.c.id.label("webhook_id"), webhooks.c.types, *(jobs.c[n] for n in _FACTS))
        .join_from(jobs, webhooks, webhooks.c.key_id == jobs.c.key_id)
        .where(jobs.c.id.in_(list(job_ids)), webhooks.c.disabled_at.is_(None))
    ).all()
    for row in ended:
        kind = COMPLETED if row.state == State.COMPLETED else FAILED
        if not {kind, ANY_END}.isdisjoint(row.types):
            connection.execute(
                outbox.insert().values(
                    id="msg_" + secrets.token_hex(16),
                    webhook_id=row.webhook_id,
                    job_id=row.id,
                    type=kind,
                    facts={name: row._mapping[name] for name in _FACTS},
                    state="WAITING",
                    attempts=0,
                    due_at=now,
                    created_at=now,
                )
            )


def any_due(connection: sa.Connection, now: float) -> bool:
    """Whether any event is due; cheap."""
    found = connection.execute(
        sa.select(outbox.c.id).where(WAITING, outbox.c.due_at <= now).limit(1)
    )
    return found.first() is not None


def lease(
    connection: sa.Connection, now: float, limit: int, each: int, full: Collection[int] = ()
) -> list[QueuedEvent]:
    """Lease up to `limit` due events, at most `each` per API key and none of the keys in `full`, so
    that one key's slow receivers do not delay others.
    """
    rank = sa.func.row_number().over(partition_by=webhooks.c.key_id, order_by=outbox.c.due_at)
    due = (
        sa.select(outbox.c.id, outbox.c.due_at, rank.label("rank"))
        .join_from(outbox, webhooks, webhooks.c.id == outbox.c.webhook_id)
        .where(WAITING, outbox.c.due_at <= now, webhooks.c.key_id.not_in(list(full)))
        .subquery()
    )
    picked = sa.select(due.c.id).where(due.c.rank <= each).order_by(due.c.due_at).limit(limit)
    taken = connection.execute(
        outbox.update()
        .where(outbox.c.id.in_(picked), WAITING, outbox.c.due_at <= now)
        .values(attempts=outbox.c.attempts + 1, due_at=now + LEASE_S)
        .returning(outbox)
    ).all()
    found = connection.execute(
        sa.select(webhooks).where(webhooks.c.id.in_({row.webhook_id for row in taken}))
    )
    hooks = {row.id: row for row in found}
    return [
        QueuedEvent(
            id=row.id,
            webhook_id=row.webhook_id,
            key_id=hooks[row.webhook_id].key_id,
            url=hooks[row.webhook_id].url,
            type=row.type,
            facts=row.facts,
            attempt=row.attempts,
        )
        for row in sorted(taken, key=lambda row: row.created_at)
    ]


def delivered(connection: sa.Connection, event: QueuedEvent, status: int, now: float) -> None:
    """Mark an event delivered, even if its lease has run out."""
    connection.execute(
        outbox.update()
        .where(outbox.c.id == event.id, WAITING)
        .values(state="DELIVERED", ended_at=now, status=status, problem=None)
    )


def failed(
    connection: sa.Connection,
    event: QueuedEvent,
    status: int | None,
    problem: str,
    now: float,
    again_in_s: float | None,
) -> None:
    """Record a failed attempt; due again after again_in_s, dead if that is None."""
    last = again_in_s is None
    connection.execute(
        outbox.update()
        .where(outbox.c.id == event.id, WAITING, outbox.c.attempts == event.attempt)
        .values(
            state="DEAD" if last else "WAITING",
            ended_at=now if last else None,
            due_at=now + (again_in_s or 0.0),
            status=status,
            problem=problem,
        )
    )


def gone(connection: sa.Connection, webhook_id: str, now: float) -> None:
    """Disable a webhook whose receiver answered 410."""
    connection.execute(
        webhooks.update()
        .where(webhooks.c.id == webhook_id, webhooks.c.disabled_at.is_(None))
        .values(disabled_at=now)
    )
    drop_waiting(connection, webhook_id, "the receiver answered 410: the webhook is disabled", now)


def delete_older(connection: sa.Connection, before: float) -> None:
    """Delete events that ended, and webhooks that were disabled, before a time."""
    connection.execute(outbox.delete().where(outbox.c.ended_at < before))
    logged = sa.exists().where(outbox.c.webhook_id == webhooks.c.id)
    connection.execute(webhooks.delete().where(webhooks.c.disabled_at < before, ~logged))
