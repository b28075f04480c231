"""Checkpoints that crash workers while they are loaded: loads are recorded in the store, and what
has crashed workers is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable

from imaged.catalogue.model import Weights
from imaged.engine.loading.load import Nets, load
from imaged.errors import CheckpointRefused
from imaged.store.jobs import load_failures
from imaged.store.sql.database import Database
from imaged.worker.checkpoint_cache import CheckpointCache

CRASHED = "Workers died while they loaded it: is there memory enough for it?"


def recorded_load(db: Database, worker_id: str) -> Callable[[Weights], Nets]:
    """What loads checkpoints; runs in the loading thread. Records a load first, so that a crash can
    be traced to it.
    """

    def recorded(weights: Weights) -> Nets:
        with db.write() as connection:
            load_failures.begin(connection, worker_id, weights, time.time())
        try:
            return load(weights)
        finally:
            with db.write() as connection:
                load_failures.end(connection, worker_id)

    return recorded


def refuse_crashing(
    checkpoints: CheckpointCache, asked: Iterable[Weights], crashing: Collection[str]
) -> None:
    """Refuse weights that have crashed workers, without loading them. crashing: str() of the
    weights that have.
    """
    for weights in asked:
        known = checkpoints.refusal(weights) or checkpoints.engine(weights)
        if known is None and str(weights) in crashing:
            checkpoints.refuse(weights, CheckpointRefused(CRASHED))
