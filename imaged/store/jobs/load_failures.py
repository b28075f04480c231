"""Crashes while loading: a load that a worker began and did not end stays recorded, and a
checkpoint that crashed DEATHS workers is not loaded for a while.
"""

from __future__ import annotations

import sqlalchemy as sa

from imaged.catalogue.model import Weights
from imaged.store.sql.schema import loads, workers

DEATHS = 3  # crashes after which a checkpoint is not loaded
FORGET_S = 600.0  # after which a crash does not count


def begin(connection: sa.Connection, worker_id: str, weights: Weights, now: float) -> None:
    """Record that this worker begins to load; it loads one checkpoint at a time. Deletes
    records that no longer count.
    """
    connection.execute(
        loads.delete().where(
            (loads.c.worker_id == worker_id) | (loads.c.started_at < now - FORGET_S) & _dead()
        )
    )
    values = {"worker_id": worker_id, "weights": str(weights), "started_at": now}
    connection.execute(loads.insert().values(**values))


def end(connection: sa.Connection, worker_id: str) -> None:
    """Record that this worker's load has ended."""
    connection.execute(loads.delete().where(loads.c.worker_id == worker_id))


def clear(connection: sa.Connection, weights: Weights | None = None) -> None:
    """Forget recorded crashes, of these weights or of all."""
    chosen = sa.true() if weights is None else loads.c.weights == str(weights)
    connection.execute(loads.delete().where(chosen))


def crashing(connection: sa.Connection, now: float) -> set[str]:
    """Weights, as text, that crashed DEATHS workers within FORGET_S."""
    found = connection.execute(
        sa.select(loads.c.weights)
        .where(loads.c.started_at > now - FORGET_S, _dead())
        .group_by(loads.c.weights)
        .having(sa.func.count() >= DEATHS)
    )
    return set(found.scalars())


def _dead() -> sa.ColumnElement[bool]:
    """SQL predicate: the worker of a load has no lease."""
    return ~sa.exists().where(workers.c.id == loads.c.worker_id)
