"""Idempotency-Key: the job that was put under it before, as long as its record lives."""

from __future__ import annotations

import sqlalchemy as sa

from imaged.errors import IdempotencyMismatch
from imaged.jobs import State, Terms
from imaged.store.schema import jobs


def known(connection: sa.Connection, key_id: int, idempotency_key: str) -> bool:
    """Whether a job was put under it; only `find` says whether it may be repeated."""
    same = (jobs.c.key_id == key_id, jobs.c.idempotency_key == idempotency_key)
    return connection.execute(sa.select(jobs.c.id).where(*same)).first() is not None


def find(connection: sa.Connection, key_id: int, terms: Terms, now: float) -> str | None:
    """The id of the first job under these terms' key, or None; raises IdempotencyMismatch.

    Runs in the transaction that would insert the job, after the API key's row was locked.
    """
    if terms.idempotency_key is None:
        return None
    row = connection.execute(
        sa.select(jobs.c.id, jobs.c.fingerprint, jobs.c.expires_at, jobs.c.state).where(
            jobs.c.key_id == key_id, jobs.c.idempotency_key == terms.idempotency_key
        )
    ).first()
    if row is None:
        return None
    over = row.expires_at is not None and row.expires_at <= now
    if over and row.state != State.PARKED:  # gone, though its row is still there
        connection.execute(jobs.update().where(jobs.c.id == row.id).values(idempotency_key=None))
        return None
    if row.fingerprint != terms.fingerprint:
        raise IdempotencyMismatch()
    return str(row.id)
