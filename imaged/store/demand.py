"""Which models are asked for, and on which workers their checkpoints lie."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from imaged.jobs import State
from imaged.store.moves import QUEUED, in_vain
from imaged.store.schema import jobs, workers

STATES = ("BUSY", "READY", "STARTING", "UNAVAILABLE", "UNLOADED")  # the best first


#: Since when a job waits: its submit, or when a worker last let go of it.
SINCE = sa.func.coalesce(jobs.c.started_at, jobs.c.created_at)


@dataclass(frozen=True)
class Waiting:
    """The fairest of one model's waiting jobs."""

    model: str
    tag: float
    since: float
    work: int  # what it costs, in micro-dollars


def fairest(connection: sa.Connection, slugs: Collection[str], now: float) -> list[Waiting]:
    """For each of these models that has a waiting job the fairest; the fairest of all first."""
    found = []
    for slug in slugs:
        first = (
            sa.select(jobs.c.model, jobs.c.tag, SINCE, jobs.c.cost_micros)
            .where(QUEUED, jobs.c.model == slug, ~in_vain(now))
            .order_by(jobs.c.tag)
            .limit(1)
        )
        found += [Waiting(*row) for row in connection.execute(first)]
    return sorted(found, key=lambda waiting: waiting.tag)


def states(connection: sa.Connection, oldest: float, besides: str = "") -> dict[str, str]:
    """Slug -> the best state that any worker seen since `oldest`, `besides` one, knows of."""
    rows = connection.execute(
        sa.select(workers.c.models).where(workers.c.seen_at > oldest, workers.c.id != besides)
    )
    best: dict[str, str] = {}
    for found in rows.scalars():
        for slug, state in (found or {}).items():
            best[slug] = min(best.get(slug, state), state, key=STATES.index)
    return best


def counts(connection: sa.Connection) -> tuple[dict[tuple[str, str], int], dict[str, float]]:
    """(model, state) -> jobs that wait or run; model -> when its oldest waiting job came."""
    rows = connection.execute(
        sa.select(jobs.c.model, jobs.c.state, sa.func.count(), sa.func.min(SINCE))
        .where(jobs.c.state.in_((State.QUEUED, State.PROCESSING)))
        .group_by(jobs.c.model, jobs.c.state)
    ).all()
    found = {(model, str(state)): count for model, state, count, _ in rows}
    return found, {model: oldest for model, state, _, oldest in rows if state == State.QUEUED}


def workers_since(connection: sa.Connection, oldest: float) -> int:
    """Workers that were seen since `oldest`."""
    alive = sa.select(sa.func.count()).where(workers.c.seen_at > oldest)
    return int(connection.execute(alive).scalar_one())
