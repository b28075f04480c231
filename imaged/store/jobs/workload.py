"""Workload: recent jobs and the queue, for forecasts. Work is measured by price, which is
proportional to pixels and UNet calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from imaged.jobs import State
from imaged.params.image_params import ImageParams
from imaged.store.jobs.model_demand import workers_since
from imaged.store.jobs.transitions import QUEUED
from imaged.store.sql.schema import api_keys, jobs, progress

MAX_PAST = 100
MAX_WAITING = 10_000  # further jobs are not read


@dataclass(frozen=True)
class Past:
    """A completed job."""

    model: str
    work: int
    started_at: float
    finished_at: float


@dataclass(frozen=True)
class Open:
    """A running job, or one that will be claimed before the key's next. work: what is left."""

    model: str
    work: float


@dataclass(frozen=True)
class Pace:
    """Input of a forecast."""

    past: list[Past]
    ahead: list[Open]  # in the order in which they will be claimed
    workers: int
    free_micros: int  # of the key


def pace(connection: sa.Connection, key_id: int, now: float, oldest: float) -> Pace:
    """Input of a forecast for this key; workers count if seen since `oldest`."""
    done = (
        sa.select(jobs.c.model, jobs.c.cost_micros, jobs.c.started_at, jobs.c.finished_at)
        .where(jobs.c.expires_at.is_not(None), jobs.c.state == State.COMPLETED)
        .where(jobs.c.finished_at > jobs.c.started_at)
        .where(jobs.c.epoch == 1)  # others were interrupted
        .order_by(jobs.c.expires_at.desc())
        .limit(MAX_PAST)
    )
    key = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).one()
    mine = max(key.tag, now)
    waiting = (
        sa.select(jobs.c.model, jobs.c.cost_micros)
        .where(QUEUED, jobs.c.tag <= mine)
        .order_by(jobs.c.tag)
        .limit(MAX_WAITING)
    )
    return Pace(
        [Past(*row) for row in connection.execute(done)],
        [*_running(connection), *(Open(*row) for row in connection.execute(waiting))],
        workers_since(connection, oldest),
        key.balance_micros - key.reserved_micros,
    )


def _running(connection: sa.Connection) -> list[Open]:
    """Running jobs with the work left of them, by UNet calls."""
    fields = (jobs.c.model, jobs.c.cost_micros, jobs.c.params, progress.c.calls_done)
    rows = connection.execute(
        sa.select(*fields)
        .join_from(jobs, progress, progress.c.job_id == jobs.c.id, isouter=True)
        .where(sa.text("jobs.state = 'PROCESSING'"))
    )
    found = []
    for model, work, values, done in rows:
        params = ImageParams(**values)
        calls = params.unet_calls * params.samples
        found.append(Open(model, work * (1 - min(done or 0, calls) / calls)))
    return found
