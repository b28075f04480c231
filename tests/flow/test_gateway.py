"""The gateway's guards and chores without a server: what breaks off, what fails, what is over."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from imaged.errors import CommandError
from imaged.gateway.operations import maintenance
from imaged.gateway.present import bodies
from imaged.gateway.present.links import Links
from imaged.gateway.read.job_reader import JobReader
from imaged.gateway.transport.body_limit import MAX_HEADERS, BodyLimit
from imaged.gateway.transport.response_cache import ResponseCache
from imaged.store.accounts import keys
from imaged.store.blobs import Blobs
from imaged.store.jobs import queue
from imaged.store.sql.database import Watch
from imaged.store.sql.schema import jobs
from tests.conftest import until_async
from tests.in_store import make_key, put


@pytest.fixture
def job_id(db: Any) -> str:
    return put(db, make_key(db), now=time.time())


def through_guard(messages: list[dict[str, Any]], headers: list[tuple[bytes, bytes]]) -> Any:
    """The bodies that reached the app, and the statuses that were sent back."""
    bodies, statuses = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        bodies.append((await receive())["body"])

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    scope = {"type": "http", "method": "POST", "headers": headers}
    asyncio.run(BodyLimit(app, 100)(scope, receive, send))
    return bodies, statuses


def test_only_whole_bodies_pass_the_guard() -> None:
    begun = {"type": "http.request", "body": b"ab", "more_body": True}
    ended = {"type": "http.request", "body": b"cd", "more_body": False}
    assert through_guard([begun, ended], []) == ([b"abcd"], [])
    assert through_guard([begun, {"type": "http.disconnect"}], []) == ([], [])
    assert through_guard([{**begun, "body": b"x" * 101}, ended], []) == ([], [413])
    large = [(b"x-large", b"x" * MAX_HEADERS)]
    assert through_guard([begun, ended], large) == ([], [431])


def test_chores_go_on_after_any_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fail(_: Any) -> None:
        calls.append(1)
        raise PermissionError("a folder that cannot be read")

    async def some_time() -> None:
        task = asyncio.create_task(maintenance.chores(SimpleNamespace()))  # type: ignore[arg-type]
        await until_async(lambda: len(calls) >= 3, every_s=0.01)
        assert not task.done()
        task.cancel()

    monkeypatch.setattr(maintenance, "CHORES_S", 0.01)
    monkeypatch.setattr(maintenance, "_chores_once", fail)
    asyncio.run(asyncio.wait_for(some_time(), 20))


def test_an_expired_job_is_gone_before_its_row_is(db: Any, job_id: str) -> None:
    reader = JobReader(db, ResponseCache(Watch(db)))
    assert set(reader._read([job_id])) == {job_id}
    with db.write() as c:
        queue.cancel(c, job_id, time.time(), 3600.0)
    assert set(reader._read([job_id])) == {job_id}
    with db.write() as c:
        c.execute(sa.update(jobs).values(expires_at=time.time() - 1))
    assert reader._read([job_id]) == {}


def test_pictures_that_a_crash_left_behind_are_swept(db: Any, job_id: str, tmp_path: Path) -> None:
    blobs, old = Blobs(f"file://{tmp_path / 'files'}"), time.time() - 7200
    known, lost, fresh = (f"{name}-1-0.jpeg" for name in (job_id, "a" * 32, "b" * 32))
    for name, at in ((known, old), (lost, old), (fresh, time.time())):
        blobs.put(name, b"x")
        os.utime(tmp_path / "files" / name[:2] / name, (at, at))
    settings = SimpleNamespace(retention_s=3600.0)
    maintenance._sweep(SimpleNamespace(db=db, blobs=blobs, settings=settings))  # type: ignore[arg-type]
    assert [blobs.read(n) for n in (known, lost, fresh)] == [b"x", None, b"x"]


def test_any_checkpoint_name_fits_a_header(db: Any, job_id: str) -> None:
    with db.read() as c:
        job = queue.read(c, [job_id])[job_id]
    image = {"width": 512, "height": 512, "seed": 1, "name": "0" * 32 + "-1-0.jpeg"}
    for name, shown in (("模型 (v2)", "%E6%A8%A1%E5%9E%8B (v2)"), ("micro", "micro")):
        done = dataclasses.replace(
            job,
            result={"images": [image], "inference_s": 1.0, "checkpoint": name},
            expires_at=time.time() + 60,
        )
        headers = bodies.v1_headers(done, Links("http://x", b"secret"))
        assert headers["x-checkpoint"] == shown
        assert all(value.encode("latin-1") for value in headers.values())


@pytest.mark.parametrize(
    ("scheduler", "samples", "made", "step"),
    [
        ("Euler", 1, 7, 7),
        ("Euler", 2, 13, 6),  # the pictures of a job advance together
        ("Heun", 1, 20, 10),  # two calls a step but for the last
        ("Heun", 1, 39, 20),
        ("Heun", 2, 78, 20),
        ("PNDM", 1, 21, 20),
    ],
)
def test_progress_counts_the_callers_steps(
    db: Any, job_id: str, scheduler: str, samples: int, made: int, step: int
) -> None:
    with db.read() as c:
        job = queue.read(c, [job_id])[job_id]
    params = dataclasses.replace(
        job.params, scheduler=scheduler, samples=samples, num_inference_steps=20
    )
    shown = bodies.steps_done(dataclasses.replace(job, params=params, calls_done=made))
    assert (shown.step, shown.steps, shown.unet_calls_done) == (step, 20, made)


def test_the_secret_is_made_once_and_never_taken_short(tmp_path: Path) -> None:
    secret = keys.load_secret(tmp_path)
    assert len(secret) == 32 and keys.load_secret(tmp_path) == secret
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]
    (tmp_path / "secret").write_bytes(b"")
    with pytest.raises(CommandError, match="should hold 32 bytes and holds 0"):
        keys.load_secret(tmp_path)
