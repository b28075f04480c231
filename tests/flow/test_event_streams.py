"""The event stream without a server: what a client sees, sees again, and leaves behind."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from imaged.gateway.api import events
from imaged.gateway.app import build_app
from imaged.gateway.context import Gateway
from imaged.gateway.read.job_reader import JobReader
from imaged.gateway.transport.response_cache import ResponseCache
from imaged.jobs import Job, JobReport, State
from imaged.settings import Settings
from imaged.store.accounts import keys
from imaged.store.accounts.keys import Key
from imaged.store.jobs import queue
from imaged.store.sql.database import Database, Watch
from tests.conftest import store
from tests.in_store import KEEP_S, SECRET, put, worker
from tests.mutants import red

IMAGE = {"name": "0" * 32 + "-1-0.jpeg", "seed": 1, "bytes": 3, "width": 512, "height": 512}
RESULT = {"images": [IMAGE], "inference_s": 1.0, "checkpoint": "micro"}


@dataclass
class Place:
    """A gateway on a store of its own, a key, and one job that waits; we play the worker."""

    app: Any
    db: Database
    key: str
    key_id: int
    job_id: str
    stops: list[bool]

    def claim(self) -> Job:
        with self.db.write() as c:
            [job] = queue.claim(c, "w", ["m"], 1, time.time())
        return job

    def beat(self, calls: int, preview: bytes | None = None, epoch: int = 1) -> None:
        with self.db.write() as c:
            held = {self.job_id: JobReport(epoch, calls, preview, calls)}
            queue.beat(c, "w", time.time(), time.time(), "micro", held)

    def finish(self, job: Job) -> None:
        with self.db.write() as c:
            assert queue.finish(c, job, "w", RESULT, time.time(), KEEP_S)

    async def get(self, path: str, **headers: str) -> httpx.Response:
        """One whole answer; of a stream only when its end has come."""
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            url = f"/v2/requests/{self.job_id}/{path}"
            return await client.get(url, headers={"x-api-key": self.key, **headers})


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "secret").write_bytes(SECRET)
    settings = Settings(data=tmp_path)
    db = store(tmp_path / "imaged.db")
    with db.write() as c:
        key = keys.create(c, SECRET, 0.0, name="t", credits_micros=10_000)
        found = keys.find(c, SECRET, key)
    assert found is not None
    worker(db, now=time.time())
    job_id = put(db, found.id, now=time.time())
    stops: list[bool] = []
    gateway = Gateway.open(settings, stopping=lambda: bool(stops))
    yield Place(build_app(gateway), db, key, found.id, job_id, stops)
    gateway.close()
    db.close()


@dataclass
class Reader:
    """A client of the stream that takes one event at a time and can go away, or stop reading."""

    place: Place
    last_id: str = ""
    reads: bool = True
    chunks: asyncio.Queue[str | None] = field(default_factory=asyncio.Queue)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aenter__(self) -> Reader:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "GET",
            "scheme": "http",
            "path": f"/v2/requests/{self.place.job_id}/events",
            "query_string": b"",
            "headers": [
                (b"x-api-key", self.place.key.encode()),
                (b"last-event-id", self.last_id.encode()),
                (b"host", b"x"),
            ],
        }
        self.task = asyncio.create_task(self.place.app(scope, self._receive, self._send))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.gone.set()
        await asyncio.wait_for(self.task, 20)

    async def _receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200
            return
        if not self.reads:
            await asyncio.Event().wait()
        self.chunks.put_nowait(message["body"].decode() if message["body"] else None)

    async def chunk(self) -> str | None:
        """The next chunk; None is the end."""
        return await asyncio.wait_for(self.chunks.get(), 20)

    async def event(self) -> tuple[str, str, dict[str, Any]]:
        """Kind, id and data of the next event."""
        while (chunk := await self.chunk()) and not chunk.startswith("event"):
            continue
        assert chunk is not None and chunk.endswith("\n\n")
        fields = dict(line.split(": ", 1) for line in chunk.splitlines() if line)
        return fields["event"], fields["id"], json.loads(fields["data"])


def run(play: Callable[[], Awaitable[None]]) -> None:
    """Play it; afterwards no task of ours may be there still."""

    async def all_of_it() -> None:
        await play()
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    asyncio.run(all_of_it())


def test_a_job_from_queue_to_picture(place: Place) -> None:
    async def play() -> None:
        ids = []
        async with Reader(place) as reader:

            async def expect(kind: str, **data: Any) -> dict[str, Any]:
                found, event_id, body = await reader.event()
                ids.append(event_id)
                assert (found, {k: body[k] for k in data}) == (kind, data)
                return body

            await expect("state", status="QUEUED", request_id=place.job_id)
            job = place.claim()
            await expect("state", status="PROCESSING", step=0, unet_calls=25)
            place.beat(5)
            await expect("progress", step=5, steps=25, unet_calls_done=5, unet_calls=25)
            place.beat(6, b"six")
            await expect("progress", step=6)
            seen = await expect("preview", content_type="image/jpeg", call=6)
            assert base64.b64decode(seen["base64"]) == b"six"
            place.finish(job)
            await expect("progress", step=25)
            body = await expect("done", status="COMPLETED")
            assert body["metrics"]["inference_time"] == 1.0
            assert await reader.chunk() is None
        assert len(set(ids)) == len(ids) == 7

    run(play)


def kinds_after(place: Place, last_id: str, count: int) -> list[str]:
    """What one who comes back with this id is told, up to `count` events or a silence."""
    kinds: list[str] = []

    async def play() -> None:
        async with Reader(place, last_id) as reader:
            while len(kinds) < count and (chunk := await reader.chunk()):
                if chunk.startswith(":"):
                    return
                if chunk.startswith("event"):
                    kinds.append(chunk.split()[1])

    run(play)
    return kinds


def ids_and_kinds(place: Place) -> list[tuple[str, str]]:
    """A running job with everything to tell: the ids and kinds of its three events."""
    place.claim()
    place.beat(6, b"six")
    told: list[tuple[str, str]] = []

    async def play() -> None:
        async with Reader(place) as reader:
            for _ in range(3):
                kind, event_id, _ = await reader.event()
                told.append((event_id, kind))

    run(play)
    return told


@pytest.fixture
def chatty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream says at once that it waits."""
    monkeypatch.setattr(events, "SILENCE_S", 0.0)


def test_who_comes_back_hears_what_is_new_and_only_that(place: Place, chatty: None) -> None:
    told = ids_and_kinds(place)
    assert [kind for _, kind in told] == ["state", "progress", "preview"]

    def resumes() -> bool:
        return all(
            kinds_after(place, last_id, 4) == ["state", "progress", "preview"][k + 1 :]
            for k, (last_id, _) in enumerate(told)
        )

    assert resumes()
    place.beat(9, b"nine")
    assert kinds_after(place, told[-1][0], 4) == ["progress", "preview"]
    place.beat(6)  # back to what was told, for the mutant
    place.beat(6, b"six")
    assert resumes()
    with red(events.Seen, "read", classmethod(lambda cls, text: cls())):
        assert resumes()  # a server that ignores Last-Event-ID


@pytest.mark.parametrize("last_id", ["", "x", "PROCESSING.1.7", "a.b.c.d", "P.1.2.-3", "9" * 900])
def test_a_strange_id_has_seen_nothing(place: Place, chatty: None, last_id: str) -> None:
    assert kinds_after(place, last_id, 2) == ["state"]


def test_after_the_end_there_is_nothing_to_come_back_for(place: Place) -> None:
    told = ids_and_kinds(place)
    with place.db.write() as c:
        queue.cancel(c, place.job_id, time.time(), KEEP_S)

    async def play() -> None:
        whole = await place.get("events", **{"last-event-id": told[-1][0]})
        assert whole.headers["content-type"].startswith("text/event-stream")
        blocks = [b for b in whole.text.split("\n\n") if b.startswith("event")]
        assert len(blocks) == 1 and blocks[0].startswith("event: done\nid: FAILED.1.6.6\n")
        body = json.loads(blocks[0].split("data: ")[1])
        assert (body["status"], body["code"]) == ("FAILED", "cancelled")
        after = await place.get("events", **{"last-event-id": "FAILED.1.6.6"})
        assert (after.status_code, after.content) == (204, b"")

    run(play)


def test_a_job_given_back_begins_anew(place: Place) -> None:
    async def play() -> None:
        place.claim()
        place.beat(9, b"nine")
        async with Reader(place) as reader:
            assert [(await reader.event())[0] for _ in range(3)] == ["state", "progress", "preview"]
            with place.db.write() as c:
                queue.end_lease(c, "w", time.time(), KEEP_S, blame=False)
            worker(place.db, now=time.time())
            assert (await reader.event())[2]["status"] == "QUEUED"
            place.claim()
            kind, event_id, body = await reader.event()
            assert (kind, event_id, body["step"]) == ("state", "PROCESSING.2.0.0", 0)
            place.beat(9, b"nine", epoch=2)  # as far as the first attempt got, and told again
            assert [(await reader.event())[1] for _ in range(2)] == [
                "PROCESSING.2.9.0",
                "PROCESSING.2.9.9",
            ]

    run(play)


def test_a_client_that_goes_away_leaves_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def leave(limit_s: float) -> bool:
        """Whether the stream's task ends once its client has gone."""
        reader = await Reader(place).__aenter__()
        await reader.event()
        reader.gone.set()
        done, _ = await asyncio.wait([reader.task], timeout=limit_s)
        reader.task.cancel()
        await asyncio.wait([reader.task])
        return bool(done)

    async def play() -> None:
        assert await leave(20)

    async def mutant() -> None:
        assert not await leave(0.3)

    run(play)
    monkeypatch.setattr(events.Stream, "listen_for_disconnect", lambda *_: asyncio.Event().wait())
    run(mutant)


def test_a_client_that_stops_reading_is_cut(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LIFE_S", 0.1)
    monkeypatch.setattr(events, "GRACE_S", 0.1)

    async def play() -> None:
        reader = await Reader(place, reads=False).__aenter__()
        await asyncio.wait_for(reader.task, 20)

    run(play)


def test_a_stream_has_its_time(place: Place) -> None:
    async def play() -> None:
        answer = await place.get("events?wait=0.1")
        assert answer.text.startswith("retry: 1000\n\nevent: state\nid: QUEUED.0.0.0\n")
        assert answer.text.count("event:") == 1
        for wrong in ("-1", "x", "nan", "3601"):
            refused = await place.get(f"events?wait={wrong}")
            assert (refused.status_code, refused.json()["code"]) == (400, "bad_parameter")

    run(play)


def test_a_server_that_stops_ends_its_streams(place: Place) -> None:
    async def play() -> None:
        async with Reader(place) as reader:
            await reader.event()
            place.stops.append(True)
            assert await reader.chunk() is None

    run(play)


def test_a_store_that_fails_ends_the_stream(place: Place) -> None:
    async def play() -> None:
        async with Reader(place) as reader:
            await reader.event()
            with place.db.write() as c:
                c.exec_driver_sql("ALTER TABLE progress RENAME TO elsewhere")
            assert await reader.chunk() is None

    run(play)


async def silent() -> Any:
    """A caller who stays and says no more."""
    await asyncio.Event().wait()


def test_while_nobody_writes_the_store_is_not_asked(place: Place) -> None:
    """And a write is heard at the next look."""
    job_id, asked = put(place.db, place.key_id, now=time.time()), list[Any]()
    read, took = queue.read, 0.0

    def noted(c: sa.Connection, ids: Any) -> Any:
        asked.append(ids)
        return read(c, ids)

    async def cancelled_after(seconds: float) -> None:
        nonlocal took
        waiting = asyncio.create_task(
            reader.wait_for_end(Key(place.key_id, "t"), job_id, 20.0, silent)
        )
        await asyncio.sleep(seconds)
        assert len(asked) == 1
        with place.db.write() as c:
            queue.cancel(c, job_id, time.time(), 60.0)
        begun = time.monotonic()
        assert (await waiting).state is State.CANCELLED
        took = time.monotonic() - begun

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue, "read", noted)
        reader = JobReader(place.db, ResponseCache(Watch(place.db)))
        asyncio.run(cancelled_after(0.5))
    assert took < 5.0 and len(asked) == 2


def test_a_status_shows_a_preview_to_who_asks(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        assert "preview" not in (await place.get("status?preview=1")).json()  # it waits
        job = place.claim()
        assert "preview" not in (await place.get("status?preview=1")).json()  # there is none yet
        place.beat(6, b"six")
        shown = (await place.get("status?preview=1")).json()
        picture = {"content_type": "image/jpeg", "base64": "c2l4", "call": 6}
        assert shown["preview"] == picture and shown["step"] == 6
        with monkeypatch.context() as patch:
            patch.setattr(JobReader, "preview", None)  # whoever reads one fails
            for query in ("", "?preview=0", "?wait=0"):
                plain = (await place.get(f"status{query}")).json()
                assert plain == {k: v for k, v in shown.items() if k != "preview"}
        for wrong in ("2", "", "true", "1&preview=0"):
            refused = await place.get(f"status?preview={wrong}")
            assert (refused.status_code, refused.json()["code"]) == (400, "bad_parameter")
        place.finish(job)
        assert "preview" not in (await place.get("status?preview=1")).json()

    run(play)
