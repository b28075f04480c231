"""Demand by model: waiting jobs, and where checkpoints are loaded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from imaged.catalogue.model import ModelState
from imaged.jobs import State
from imaged.store.jobs.transitions import QUEUED, WAITING_SINCE, past_cancel_deadline
from imaged.store.sql.schema import jobs, workers


@dataclass(frozen=True)
class FirstWaiting:
    """The first job in fair order of one model."""

    model: str
    tag: float
    since: float
    work: int  # its price, in micro-dollars


def fairest(connection: sa.Connection, slugs: Collection[str], now: float) -> list[FirstWaiting]:
    """The first waiting job of each of these models, in fair order."""
    found = []
    for slug in slugs:
        first = (
            sa.select(jobs.c.model, jobs.c.tag, WAITING_SINCE, jobs.c.cost_micros)
            .where(QUEUED, jobs.c.model == slug, ~past_cancel_deadline(now))
            .order_by(jobs.c.tag)
            .limit(1)
        )
        found += [FirstWaiting(*row) for row in connection.execute(first)]
    return sorted(found, key=lambda waiting: waiting.tag)


def states(connection: sa.Connection, oldest: float, besides: str = "") -> dict[str, ModelState]:
    """Slug -> its best state on any worker seen since `oldest`, without the worker `besides`."""
    rows = connection.execute(
        sa.select(workers.c.models).where(workers.c.seen_at > oldest, workers.c.id != besides)
    )
    best: dict[str, ModelState] = {}
    order = list(ModelState)
    for found in rows.scalars():
        for slug, state in (found or {}).items():
            here = ModelState(state)
            best[slug] = min(best.get(slug, here), here, key=order.index)
    return best


def counts(connection: sa.Connection) -> tuple[dict[tuple[str, str], int], dict[str, float]]:
    """(model, state) -> number of jobs; model -> since when its oldest job waits."""
    rows = connection.execute(
        sa.select(jobs.c.model, jobs.c.state, sa.func.count(), sa.func.min(WAITING_SINCE))
        .where(jobs.c.state.in_((State.QUEUED, State.PROCESSING)))
        .group_by(jobs.c.model, jobs.c.state)
    ).all()
    found = {(model, str(state)): count for model, state, count, _ in rows}
    return found, {model: oldest for model, state, _, oldest in rows if state == State.QUEUED}


def workers_since(connection: sa.Connection, oldest: float, *, ready: bool = False) -> int:
    """Number of workers seen since `oldest`; ready: of those that hold a checkpoint."""
    alive = sa.select(sa.func.count()).where(workers.c.seen_at > oldest)
    alive = alive.where(workers.c.checkpoint.is_not(None)) if ready else alive
    return int(connection.execute(alive).scalar_one())
