"""Idempotency-Key: finds the job of an earlier request, as long as its row exists."""

from __future__ import annotations

import sqlalchemy as sa

from imaged.errors import IdempotencyMismatch
from imaged.jobs import State, Submission
from imaged.store.sql.schema import jobs


def find(connection: sa.Connection, submission: Submission, now: float) -> str | None:
    """The id of the job with the same Idempotency-Key, or None; raises IdempotencyMismatch.

    Has to run in the transaction that inserts the job, with the API key's row locked.
    """
    row = connection.execute(
        sa.select(jobs.c.id, jobs.c.fingerprint, jobs.c.expires_at, jobs.c.state).where(
            jobs.c.key_id == submission.key_id,
            jobs.c.idempotency_key == submission.idempotency_key,
        )
    ).first()
    if row is None:
        return None
    over = row.expires_at is not None and row.expires_at <= now
    if over and row.state != State.PARKED:  # expired, though its row is not deleted yet
        connection.execute(jobs.update().where(jobs.c.id == row.id).values(idempotency_key=None))
        return None
    if row.fingerprint != submission.fingerprint:
        raise IdempotencyMismatch()
    return str(row.id)
