"""Progress of running jobs: counts and previews."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from imaged.jobs import JobReport, JobStatus, Preview, State
from imaged.store.sql.schema import jobs, progress

_STATUSES = sa.select(
    jobs.c.id, jobs.c.state, jobs.c.epoch, progress.c.calls_done, progress.c.preview_call
).join_from(jobs, progress, progress.c.job_id == jobs.c.id, isouter=True)
_PREVIEWS = sa.select(progress.c.job_id, progress.c.preview_call, progress.c.preview).where(
    progress.c.preview.is_not(None)
)


def note(connection: sa.Connection, held: Mapping[str, JobReport]) -> None:
    """Upsert counts and previews; a preview of None keeps the stored one."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    upsert: Any = insert(progress)
    new, old = upsert.excluded, progress.c
    values = {
        "calls_done": new.calls_done,
        "preview": sa.func.coalesce(new.preview, old.preview),
        "preview_call": sa.func.coalesce(new.preview_call, old.preview_call),
    }
    rows = [
        {
            "job_id": job_id,
            "calls_done": job.calls,
            "preview": job.preview,
            "preview_call": job.preview_call if job.preview else None,
        }
        for job_id, job in held.items()
    ]
    if rows:
        connection.execute(
            upsert.on_conflict_do_update(index_elements=["job_id"], set_=values), rows
        )


def statuses(connection: sa.Connection, ids: Collection[str]) -> dict[str, JobStatus]:
    """The status of those of these jobs that exist: narrow rows, for many polls."""
    found = {}
    for job_id, state, epoch, *counts in connection.execute(
        _STATUSES.where(jobs.c.id.in_(list(ids)))
    ):
        made = [count or 0 for count in counts] if state == State.PROCESSING else []
        found[job_id] = JobStatus(State(state), epoch, *made)
    return found


def previews(connection: sa.Connection, ids: Collection[str]) -> dict[str, Preview]:
    """The newest previews, of the jobs that have one."""
    rows = connection.execute(_PREVIEWS.where(progress.c.job_id.in_(list(ids))))
    return {row.job_id: Preview(row.preview_call, row.preview) for row in rows}


def drop_previews(connection: sa.Connection, ids: Collection[str]) -> None:
    """Delete the previews of ended jobs; counts stay."""
    if ids:
        connection.execute(
            progress.update()
            .where(progress.c.job_id.in_(list(ids)), progress.c.preview.is_not(None))
            .values(preview=None, preview_call=None)
        )


def delete(connection: sa.Connection, ids: Collection[str]) -> None:
    """Delete the progress of deleted or restarted jobs."""
    if ids:
        connection.execute(progress.delete().where(progress.c.job_id.in_(list(ids))))
