"""Idempotency-Key: finds the job of an earlier request, as long as its row exists."""

from __future__ import annotations

import sqlalchemy as sa

from imaged.errors import IdempotencyMismatch
from imaged.jobs import RequestOptions, State
from imaged.store.sql.schema import jobs


def known(connection: sa.Connection, key_id: int, idempotency_key: str) -> bool:
    """Whether a job has this key; `find` also compares the requests."""
    same = (jobs.c.key_id == key_id, jobs.c.idempotency_key == idempotency_key)
    return connection.execute(sa.select(jobs.c.id).where(*same)).first() is not None


def find(connection: sa.Connection, key_id: int, options: RequestOptions, now: float) -> str | None:
    """The id of the job with the same Idempotency-Key, or None; raises IdempotencyMismatch.

    Has to run in the transaction that inserts the job, with the API key's row locked.
    """
    if options.idempotency_key is None:
        return None
    row = connection.execute(
        sa.select(jobs.c.id, jobs.c.fingerprint, jobs.c.expires_at, jobs.c.state).where(
            jobs.c.key_id == key_id, jobs.c.idempotency_key == options.idempotency_key
        )
    ).first()
    if row is None:
        return None
    over = row.expires_at is not None and row.expires_at <= now
    if over and row.state != State.PARKED:  # expired, though its row is not deleted yet
        connection.execute(jobs.update().where(jobs.c.id == row.id).values(idempotency_key=None))
        return None
    if row.fingerprint != options.fingerprint:
        raise IdempotencyMismatch()
    return str(row.id)
