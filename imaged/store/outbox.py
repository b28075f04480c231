"""The outbox: every end of a job that a webhook wants to hear of, until it has heard.

A row is written in the transaction that ends the job, so that neither is without the other. A
dispatcher leases rows; one that dies with a row in hand loses it when the lease runs out, and the
row is told again: at least once, under one id.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from imaged.jobs import State
from imaged.store.schema import jobs, outbox, webhooks
from imaged.store.webhooks import ANY_END, COMPLETED, FAILED, drop_waiting

WAITING = sa.text("outbox.state = 'WAITING'")  # literal, so that the partial index is used
LEASE_S = 30.0  # more than an attempt can take
_FACTS = (
    *("id", "model", "state", "reason", "error", "cost_micros"),
    *("created_at", "started_at", "finished_at"),
    "remaining_micros",  # of who was charged
)


@dataclass(frozen=True)
class Parcel:
    """One attempt to tell a webhook of a job's end; `attempt` counts from one."""

    id: str
    webhook_id: str
    key_id: int
    url: str
    type: str
    facts: Mapping[str, Any]
    attempt: int


def announce(connection: sa.Connection, job_ids: Collection[str], now: float) -> None:
    """Write down who is to hear that these jobs have ended; within their transaction."""
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
    """Whether there is something to lease; cheap enough to ask all the time."""
    found = connection.execute(
        sa.select(outbox.c.id).where(WAITING, outbox.c.due_at <= now).limit(1)
    )
    return found.first() is not None


def lease(
    connection: sa.Connection, now: float, limit: int, each: int, full: Collection[int] = ()
) -> list[Parcel]:
    """Take up to `limit` due rows, at most `each` of one API key and none of the keys in `full`:
    nobody's slow receivers hold up another's messages.
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
        Parcel(
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


def delivered(connection: sa.Connection, parcel: Parcel, status: int, now: float) -> None:
    """It has heard, also when the lease had run out in the meantime."""
    connection.execute(
        outbox.update()
        .where(outbox.c.id == parcel.id, WAITING)
        .values(state="DELIVERED", ended_at=now, status=status, problem=None)
    )


def failed(
    connection: sa.Connection,
    parcel: Parcel,
    status: int | None,
    problem: str,
    now: float,
    again_in_s: float | None,
) -> None:
    """It has not heard: due again after `again_in_s`, or never if that is None."""
    last = again_in_s is None
    connection.execute(
        outbox.update()
        .where(outbox.c.id == parcel.id, WAITING, outbox.c.attempts == parcel.attempt)
        .values(
            state="DEAD" if last else "WAITING",
            ended_at=now if last else None,
            due_at=now + (again_in_s or 0.0),
            status=status,
            problem=problem,
        )
    )


def gone(connection: sa.Connection, webhook_id: str, now: float) -> None:
    """The receiver said that it is no more: the webhook is disabled."""
    connection.execute(
        webhooks.update()
        .where(webhooks.c.id == webhook_id, webhooks.c.disabled_at.is_(None))
        .values(disabled_at=now)
    )
    drop_waiting(connection, webhook_id, "the receiver answered 410: the webhook is disabled", now)


def expire(connection: sa.Connection, before: float) -> None:
    """Forget what ended before a time, and the webhooks that were disabled before it."""
    connection.execute(outbox.delete().where(outbox.c.ended_at < before))
    logged = sa.exists().where(outbox.c.webhook_id == webhooks.c.id)
    connection.execute(webhooks.delete().where(webhooks.c.disabled_at < before, ~logged))
