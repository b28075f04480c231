"""Rows of the store made and read by hand: for tests of it, and of what stands on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imaged.catalogue.model import Model, Weights
from imaged.jobs import Job, Submission
from imaged.params.image_params import ImageParams
from imaged.store.accounts import keys, ledger
from imaged.store.jobs import queue
from imaged.store.sql.database import Database

SECRET = b"s" * 32
RESULT = {"images": [], "inference_s": 1.0, "checkpoint": "micro"}
KEEP_S = 3600.0


def make_key(db: Database, credits_micros: int = 1000, rpm: int = 10_000) -> int:
    with db.write() as c:
        key = keys.create(c, SECRET, 0.0, name="t", credits_micros=credits_micros, rpm=rpm)
        found = keys.find(c, SECRET, key)
    assert found is not None
    return found.id


def asking(
    key_id: int,
    cost: int = 10,
    model: str = "m",
    params: ImageParams = ImageParams("x"),  # noqa: B008 (frozen)
    **more: Any,
) -> Submission:
    """What a request of this price asks for, of a model that need not be there."""
    offered = Model(model, model, Weights(Path(model)))
    return Submission(key_id, offered, params, quoted_micros=cost, **more)


def put(db: Database, key_id: int, cost: int = 10, *, now: float = 1.0, **more: Any) -> str:
    with db.write() as c:
        return queue.put(c, asking(key_id, cost, **more), now).job_id


def worker(db: Database, name: str = "w", now: float = 1.0) -> str:
    with db.write() as c:
        queue.register(c, name, 1, "host", now)
    return name


def claim(db: Database, name: str = "w", limit: int = 9, now: float = 2.0) -> list[Job]:
    with db.write() as c:
        return queue.claim(c, name, ["m"], limit, now)


def get(db: Database, job_id: str) -> Job:
    with db.read() as c:
        return queue.read(c, [job_id])[job_id]


def free(db: Database, key_id: int) -> int:
    with db.read() as c:
        return ledger.free(c, key_id)


def audit(db: Database) -> list[str]:
    with db.read() as c:
        return ledger.audit(c)
