"""Drafts: jobs that rest after some steps until somebody has chosen what goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa

from imaged.jobs import Job, State
from imaged.params import ImageParams
from imaged.store import progress
from imaged.store.moves import end, running
from imaged.store.schema import jobs


def park(
    connection: sa.Connection,
    job: Job,
    worker_id: str,
    result: Mapping[str, Any],
    calls: int,
    now: float,
    retention_s: float,
) -> bool:
    """PARKED with what there is to look at, if the worker still holds this epoch.

    `calls` were made over all pictures: what they cost is owed from now on.
    """
    assert job.draft is not None
    draft = replace(job.draft, calls=calls, cost_micros=job.cost_of(calls))
    parked = connection.execute(
        jobs.update()
        .where(jobs.c.id == job.id, jobs.c.epoch == job.epoch, running(worker_id))
        .values(
            state=State.PARKED,
            worker_id=None,
            attempts=jobs.c.attempts - 1,  # nobody has died of it
            result=dict(result),
            draft=asdict(draft),
            expires_at=now + retention_s,
        )
    )
    if parked.rowcount:
        progress.drop_previews(connection, [job.id])
    return bool(parked.rowcount)


def go_on(
    connection: sa.Connection, job: Job, samples: Sequence[int], params: ImageParams, now: float
) -> bool:
    """The chosen pictures of a parked job wait for a worker; False if it is parked no more."""
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
            started_at=now,  # what it waits for now has nothing to do with what it waited before
            cancel_at=None,
            expires_at=None,
        )
    )
    if moved.rowcount:
        progress.forget(connection, [job.id])  # it was of other pictures
    return bool(moved.rowcount)


def forget(connection: sa.Connection, now: float, retention_s: float) -> int:
    """End the drafts that nobody has finished in time; what was made of them is charged."""
    return end(
        connection,
        [jobs.c.state == State.PARKED, jobs.c.expires_at < now],
        State.CANCELLED,
        "draft_expired",
        "the draft was not finished in time",
        now,
        retention_s,
    )
