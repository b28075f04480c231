"""Checkpoints that workers are loading. What a worker began to load and did not live to end
stays here: a checkpoint that ends one worker after another is left alone for a while.
"""

from __future__ import annotations

import sqlalchemy as sa

from imaged.catalogue import Weights
from imaged.store.schema import loads, workers

DEATHS = 3  # of workers that were loading the same, and it is left alone
FORGET_S = 600.0  # after which a death counts no more


def begin(connection: sa.Connection, worker_id: str, weights: Weights, now: float) -> None:
    """This worker begins to load these weights; it loads one checkpoint at a time."""
    connection.execute(
        loads.delete().where(
            (loads.c.worker_id == worker_id) | (loads.c.started_at < now - FORGET_S) & _dead()
        )
    )
    values = {"worker_id": worker_id, "weights": str(weights), "started_at": now}
    connection.execute(loads.insert().values(**values))


def end(connection: sa.Connection, worker_id: str) -> None:
    """What it was loading has come, was refused or is not wanted any more."""
    connection.execute(loads.delete().where(loads.c.worker_id == worker_id))


def forget(connection: sa.Connection, weights: Weights | None = None) -> None:
    """What workers died of is tried again: these weights, or all."""
    chosen = sa.true() if weights is None else loads.c.weights == str(weights)
    connection.execute(loads.delete().where(chosen))


def deadly(connection: sa.Connection, now: float) -> set[str]:
    """Weights, as text, in whose loading DEATHS workers have died lately."""
    found = connection.execute(
        sa.select(loads.c.weights)
        .where(loads.c.started_at > now - FORGET_S, _dead())
        .group_by(loads.c.weights)
        .having(sa.func.count() >= DEATHS)
    )
    return set(found.scalars())


def _dead() -> sa.ColumnElement[bool]:
    """The worker has no lease any more."""
    return ~sa.exists().where(workers.c.id == loads.c.worker_id)
