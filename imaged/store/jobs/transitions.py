"""Transitions shared by all who end or requeue jobs; inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from imaged.jobs import MAX_ATTEMPTS, OPEN, Job, State
from imaged.store.accounts import ledger
from imaged.store.jobs.progress import delete, drop_previews
from imaged.store.sql.schema import jobs
from imaged.store.webhooks import outbox

#: Failures caused by the request itself: if it was changed at a draft, the draft is charged.
OF_THE_REQUEST = ("prompt_too_long", "prompt_unreadable")
QUEUED = sa.text("jobs.state = 'QUEUED'")  # literal, so that the partial index is used
#: SQL: since when a job waits: its submit, or its last requeueing.
WAITING_SINCE = sa.func.coalesce(jobs.c.started_at, jobs.c.created_at)


def past_cancel_deadline(now: float) -> sa.ColumnElement[bool]:
    """SQL predicate: Cancel-After has passed. COALESCEd to false, so that it can be negated."""
    return sa.func.coalesce(jobs.c.cancel_at < now, sa.false())


def running(worker_id: str) -> sa.ColumnElement[bool]:
    """SQL predicate: this worker runs the job."""
    return sa.and_(jobs.c.state == State.PROCESSING, jobs.c.worker_id == worker_id)


def still_held(job: Job, worker_id: str) -> sa.ColumnElement[bool]:
    """SQL predicate: the worker still runs the attempt that it claimed."""
    return sa.and_(jobs.c.id == job.id, jobs.c.epoch == job.epoch, running(worker_id))


def requeue(
    connection: sa.Connection,
    where: sa.ColumnElement[bool],
    now: float,
    retention_s: float,
    *,
    blame: bool,
    begun: bool = True,
) -> int:
    """PROCESSING -> QUEUED; returns how many, with those that fail.

    blame: the worker crashed: the attempt counts, jobs with MAX_ATTEMPTS fail.
    begun: the job had started: without blame its Cancel-After is cleared.
    """
    count = 0
    if blame:
        count = end(
            connection,
            [where, jobs.c.attempts >= MAX_ATTEMPTS],
            State.FAILED,
            "worker_lost",
            "the worker stopped while it made this picture",
            now,
            retention_s,
        )
    attempts = jobs.c.attempts if blame else jobs.c.attempts - 1
    moved = connection.execute(
        jobs.update()
        .where(where)
        .values(
            state=State.QUEUED,
            worker_id=None,
            attempts=attempts,
            started_at=now,  # since when it waits
            **({"cancel_at": None} if begun and not blame else {}),
        )
        .returning(jobs.c.id)
    ).all()
    delete(connection, [row.id for row in moved])
    return count + len(moved)


def end(
    connection: sa.Connection,
    where: Sequence[Any],
    state: State,
    reason: str,
    error: str,
    now: float,
    retention_s: float,
) -> int:
    """End jobs without an image, and release their reserve; returns how many. A draft that was
    shown is charged if the job is cancelled, or fails by the caller's change.
    """
    ended = connection.execute(
        jobs.update()
        .where(*where, jobs.c.state.in_(OPEN))
        .values(
            state=state,
            worker_id=None,
            reason=reason,
            error=error,
            finished_at=now,
            expires_at=now + retention_s,
        )
        .returning(jobs.c.id, jobs.c.key_id, jobs.c.cost_micros, jobs.c.draft)
    ).all()
    drop_previews(connection, [row.id for row in ended])
    for row in ended:
        draft = row.draft or {"cost_micros": 0, "varied": False}
        own_fault = draft["varied"] and reason in OF_THE_REQUEST
        owed = draft["cost_micros"] if state is State.CANCELLED or own_fault else 0
        if owed:
            charge(connection, row.key_id, row.id, row.cost_micros, owed, now)
        else:
            ledger.release(connection, row.key_id, row.id, row.cost_micros, now)
    if ended:
        outbox.announce(connection, [row.id for row in ended], now)
    return len(ended)


def charge(
    connection: sa.Connection, key_id: int, job_id: str, held: int, owed: int, now: float
) -> None:
    """Settle: charge `owed` of the reserve `held`, release the rest; micro-dollars."""
    ledger.settle(connection, key_id, job_id, owed, now, reserved_micros=held)
    values = {"cost_micros": owed, "remaining_micros": ledger.free(connection, key_id)}
    connection.execute(jobs.update().where(jobs.c.id == job_id).values(**values))
