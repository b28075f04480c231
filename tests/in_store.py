"""Rows of the store made and read by hand: for tests of it, and of what stands on it."""

from __future__ import annotations

from imaged.jobs import DEFAULT_OPTIONS, Job, RequestOptions, new_job_id
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


def put(
    db: Database,
    key_id: int,
    cost: int = 10,
    model: str = "m",
    now: float = 1.0,
    options: RequestOptions = DEFAULT_OPTIONS,
) -> str:
    job_id = new_job_id()
    with db.write() as c:
        queue.put(
            c,
            job_id=job_id,
            key_id=key_id,
            model=model,
            params=ImageParams("x"),
            cost_micros=cost,
            now=now,
            options=options,
        )
    return job_id


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
