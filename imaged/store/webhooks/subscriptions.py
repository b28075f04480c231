"""Webhook subscriptions of API keys, and their logs."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from imaged.errors import TooManyWebhooks, UnknownWebhook
from imaged.store.signing import mac
from imaged.store.sql.schema import outbox, webhooks

MAX_WEBHOOKS_PER_KEY = 20
COMPLETED, FAILED = "generation.completed", "generation.failed"
ANY_END = "GENERATION"  # the vendor's name, for both
TYPES = (ANY_END, COMPLETED, FAILED)
LOG_LINES = 100


@dataclass(frozen=True)
class Webhook:
    """One subscription; `types` are of TYPES, times are seconds since 1970."""

    id: str
    key_id: int
    url: str
    types: Sequence[str]
    created_at: float
    disabled_at: float | None


@dataclass(frozen=True)
class Event:
    """One line of the delivery log."""

    id: str
    job_id: str
    type: str
    state: str  # WAITING, DELIVERED or DEAD
    attempts: int
    due_at: float
    created_at: float
    ended_at: float | None
    status: int | None  # of the last answer
    problem: str | None  # of the last attempt


def secret_of(secret: bytes, webhook_id: str) -> str:
    """The webhook's signing secret, derived from the installation's; it is not stored."""
    made = mac(secret, b"webhook:" + webhook_id.encode())
    return "whsec_" + base64.b64encode(made).decode()


def add(
    connection: sa.Connection, key_id: int, url: str, types: Sequence[str], now: float
) -> Webhook:
    """Subscribe; raises TooManyWebhooks."""
    if len(of_key(connection, key_id)) >= MAX_WEBHOOKS_PER_KEY:
        raise TooManyWebhooks(
            f"This key has {MAX_WEBHOOKS_PER_KEY} webhooks, which is the most it may have."
        )
    webhook = Webhook(str(uuid.uuid4()), key_id, url, list(types), now, None)
    connection.execute(webhooks.insert().values(vars(webhook)))
    return webhook


def of_key(connection: sa.Connection, key_id: int) -> list[Webhook]:
    """Active webhooks of a key, oldest first."""
    rows = connection.execute(
        sa.select(webhooks)
        .where(webhooks.c.key_id == key_id, webhooks.c.disabled_at.is_(None))
        .order_by(webhooks.c.created_at, webhooks.c.id)
    )
    return [Webhook(**row._mapping) for row in rows]


def update(
    connection: sa.Connection, key_id: int, webhook_id: str, url: str, types: Sequence[str]
) -> Webhook:
    """Change URL and types, also for waiting events; raises UnknownWebhook."""
    row = connection.execute(
        webhooks.update()
        .where(_active(key_id, webhook_id))
        .values(url=url, types=list(types))
        .returning(webhooks)
    ).first()
    if row is None:
        raise UnknownWebhook()
    return Webhook(**row._mapping)


def deactivate(connection: sa.Connection, key_id: int, webhook_id: str, now: float) -> None:
    """Disable a webhook; its log stays for a week. Raises UnknownWebhook."""
    changed = connection.execute(
        webhooks.update().where(_active(key_id, webhook_id)).values(disabled_at=now)
    )
    if not changed.rowcount:
        raise UnknownWebhook()
    drop_waiting(connection, webhook_id, "the webhook was deleted", now)


def drop_waiting(connection: sa.Connection, webhook_id: str, problem: str, now: float) -> None:
    """Mark a webhook's waiting events dead."""
    connection.execute(
        outbox.update()
        .where(outbox.c.webhook_id == webhook_id, outbox.c.state == "WAITING")
        .values(state="DEAD", ended_at=now, problem=problem)
    )


def log_of(connection: sa.Connection, key_id: int, webhook_id: str) -> list[Event]:
    """The newest events of a webhook, also of a deleted one; raises UnknownWebhook."""
    owned = sa.and_(webhooks.c.id == webhook_id, webhooks.c.key_id == key_id)
    if connection.execute(sa.select(webhooks.c.id).where(owned)).first() is None:
        raise UnknownWebhook()
    columns = [outbox.c[name] for name in Event.__dataclass_fields__]
    rows = connection.execute(
        sa.select(*columns)
        .where(outbox.c.webhook_id == webhook_id)
        .order_by(outbox.c.created_at.desc(), outbox.c.id)
        .limit(LOG_LINES)
    )
    return [Event(**row._mapping) for row in rows]


def _active(key_id: int, webhook_id: str) -> sa.ColumnElement[bool]:
    return sa.and_(
        webhooks.c.id == webhook_id,
        webhooks.c.key_id == key_id,
        webhooks.c.disabled_at.is_(None),
    )
