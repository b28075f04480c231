"""Drafts: jobs that rest after some steps until the caller chooses images to finish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa

from imaged.jobs import Job, State
from imaged.params.image_params import ImageParams
from imaged.store.jobs import progress
from imaged.store.jobs.transitions import end, still_held
from imaged.store.sql.schema import jobs


def park(
    connection: sa.Connection,
    job: Job,
    worker_id: str,
    result: Mapping[str, Any],
    calls: int,
    now: float,
    retention_s: float,
) -> bool:
    """PROCESSING -> PARKED with a result to look at; False if the worker holds the job no more.

    calls: UNet calls made, over all images; their price is owed from now on.
    """
    assert job.draft is not None
    draft = replace(job.draft, calls=calls, cost_micros=job.cost_of(calls))
    parked = connection.execute(
        jobs.update()
        .where(still_held(job, worker_id))
        .values(
            state=State.PARKED,
            worker_id=None,
            attempts=jobs.c.attempts - 1,  # it did not crash
            result=dict(result),
            draft=asdict(draft),
            expires_at=now + retention_s,
        )
    )
    if parked.rowcount:
        progress.drop_previews(connection, [job.id])
    return bool(parked.rowcount)


def resume(
    connection: sa.Connection, job: Job, samples: Sequence[int], params: ImageParams, now: float
) -> bool:
    """PARKED -> QUEUED for the chosen images; False if the job is not parked."""
    assert job.draft is not None
    varied = params != job.params
    draft = replace(job.draft, samples=tuple(samples), varied=varied)
    moved = connection.execute(
        jobs.update()
        .where(jobs.c.id == job.id, jobs.c.state == State.PARKED)
        .values(
            state=State.QUEUED,
            draft=asdict(draft),
            params=params.as_dict(),
            started_at=now,  # since when it waits
            cancel_at=None,
            expires_at=None,
        )
    )
    if moved.rowcount:
        progress.delete(connection, [job.id])  # of the draft
    return bool(moved.rowcount)


def cancel_expired(connection: sa.Connection, now: float, retention_s: float) -> int:
    """Cancel drafts that were not finished in time; what was made of them is charged."""
    which = [jobs.c.state == State.PARKED, jobs.c.expires_at < now]
    reason, error = "draft_expired", "the draft was not finished in time"
    return end(connection, which, State.CANCELLED, reason, error, now, retention_s)
