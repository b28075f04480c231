"""Who is woken by a write, and what a write costs those whom it does not concern."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from imaged.errors import UnknownRequest
from imaged.gateway.read import job_reader, job_watcher
from imaged.gateway.read.job_reader import JobReader
from imaged.gateway.read.job_watcher import MAX_REST_S, REST, JobWatcher
from imaged.gateway.transport.response_cache import ResponseCache
from imaged.jobs import Job, JobReport, JobStatus, State
from imaged.store.accounts.keys import Key
from imaged.store.jobs import progress, queue
from imaged.store.sql import database as db_module
from imaged.store.sql.database import SELDOM_S, Database, Watch
from imaged.store.sql.schema import jobs
from tests.conftest import until_async
from tests.in_store import KEEP_S, make_key, put, worker

MANY = 40


class Unsure:
    """Of a store that cannot tell of writes."""

    exact, hint, pause_s = False, None, SELDOM_S

    def changed(self) -> bool:
        return True


@dataclass
class Place:
    """A board with many jobs on it, and what it asks of the store."""

    db: Database
    key_id: int
    job_ids: list[str]
    stops: list[bool] = field(default_factory=list)
    statuses: list[set[str]] = field(default_factory=list)  # ids of each narrow query
    whole: list[set[str]] = field(default_factory=list)  # of each query of rows

    def reader(self, watch: Any = None) -> JobReader:
        return JobReader(self.db, ResponseCache(watch or Watch(self.db)), lambda: bool(self.stops))

    def watcher(self) -> JobWatcher:
        return self.reader()._watcher

    def cancel(self, *job_ids: str) -> None:
        with self.db.write() as c:
            for job_id in job_ids:
                queue.cancel(c, job_id, time.time(), KEEP_S)

    def beat(self) -> None:
        with self.db.write() as c:
            queue.beat(c, "w", time.time(), time.time(), "micro", {})

    def submit(self) -> None:
        put(self.db, self.key_id, now=time.time())

    async def seen(self, write: Callable[[], object]) -> None:
        """Write, and wait until the board has seen it."""
        before = len(self.statuses)
        write()
        await until(lambda: len(self.statuses) > before)

    async def nothing(self, count: int = 5) -> None:
        """Writes that concern nobody who waits, each of them seen."""
        for k in range(count):
            await self.seen(self.beat if k % 2 else self.submit)

    def call(self, reader: JobReader, job_id: str, wait_s: float = 20.0) -> asyncio.Task[Job]:
        return asyncio.create_task(
            reader.wait_for_end(Key(self.key_id, "t"), job_id, wait_s, asyncio.Event().wait)  # type: ignore[arg-type]
        )

    async def calls(self, reader: JobReader) -> list[asyncio.Task[Job]]:
        """Many who wait, each for a job of their own, when each has been looked at."""
        tasks = [self.call(reader, job_id) for job_id in self.job_ids]
        await until(lambda: set(self.job_ids) <= set[str]().union(*self.statuses))
        return tasks


@pytest.fixture
def place(db: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    key_id = make_key(db, credits_micros=10**9)
    worker(db, now=time.time())
    made = Place(db, key_id, [put(db, key_id, now=time.time()) for _ in range(MANY)])
    statuses, read = progress.statuses, queue.read

    def count_stands(c: Any, ids: Any) -> Any:
        found = statuses(c, ids)
        made.statuses.append(set(ids))
        return found

    def count_whole(c: Any, ids: Any) -> Any:
        made.whole.append(set(ids))
        return read(c, ids)

    monkeypatch.setattr(progress, "statuses", count_stands)
    monkeypatch.setattr(queue, "read", count_whole)
    yield made


until = partial(until_async, limit_s=20, every_s=0.001)


def run(play: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(play())  # type: ignore[arg-type]


def test_a_write_costs_those_whom_it_does_not_concern_one_narrow_query(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        tasks = await place.calls(place.reader())
        await until(lambda: sum(map(len, place.whole)) >= MANY)
        place.whole.clear()
        place.statuses.clear()
        await place.nothing(5)
        assert [len(ids) for ids in place.statuses[:5]] == [MANY] * 5  # all of them in one query
        assert len(place.statuses) == 5
        read = len(place.whole)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        told.append(read)

    told: list[int] = []
    run(play)
    assert told == [0]
    monkeypatch.setattr(
        job_reader, "at_rest", lambda status: True
    )  # whoever waits reads at every write
    run(play)
    assert told[1] > 0


def test_only_who_is_concerned_is_woken(place: Place) -> None:
    async def play() -> None:
        tasks = await place.calls(place.reader())
        await until(lambda: sum(map(len, place.whole)) >= MANY)
        place.whole.clear()
        ended = place.job_ids[3:6]
        place.cancel(*ended)
        done = await asyncio.gather(*tasks[3:6])
        assert [job.state for job in done] == [State.CANCELLED] * 3
        assert set[str]().union(*place.whole) == set(ended)
        assert not any(task.done() for task in tasks[:3] + tasks[6:])
        place.stops.append(True)  # and the rest goes when the server does
        assert {job.state for job in await asyncio.gather(*tasks[6:])} == {State.QUEUED}

    run(play)


class Forgetful(set[str]):
    """Takes nothing in."""

    def add(self, _: str) -> None:
        pass


def test_a_write_before_the_wait_is_heard(place: Place) -> None:
    """It was seen for others before one who had read before it begins to wait."""
    first, second, third = place.job_ids[:3]

    async def play() -> None:
        watcher = place.watcher()
        other = asyncio.create_task(watcher.wait(first, lambda _: False, 20.0))
        await until(lambda: bool(place.statuses))
        await place.seen(lambda: place.cancel(second, third))
        assert await watcher.wait(second, job_reader.at_rest, 20.0)
        watcher._new = Forgetful()
        assert not await watcher.wait(third, job_reader.at_rest, 0.3)
        other.cancel()

    run(play)


def test_with_nobody_waiting_nothing_looks(place: Place) -> None:
    watch, looks = Watch(place.db), list[int]()
    right = watch.changed

    def counted() -> Any:
        looks.append(1)
        return right()

    watch.changed = counted  # type: ignore[method-assign]

    async def left(reader: JobReader, leave: Callable[[asyncio.Task[Any]], object]) -> None:
        before, task = len(looks), place.call(reader, place.job_ids[0])
        await until(lambda: len(looks) > before + 2)
        leave(task)
        await asyncio.wait([task])
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        before_rest = len(looks)
        place.beat()
        await asyncio.sleep(3 * SELDOM_S)
        assert len(looks) == before_rest

    async def play() -> None:
        reader = place.reader(watch)
        await left(reader, lambda task: task.cancel())
        await left(reader, lambda _: place.cancel(place.job_ids[0]))

    run(play)


def test_who_comes_as_the_last_one_leaves_is_looked_for(place: Place) -> None:
    async def play() -> None:
        watcher = place.watcher()
        first = asyncio.create_task(watcher.wait(place.job_ids[0], lambda _: False, 20.0))
        await until(lambda: bool(place.statuses))
        first.cancel()
        await asyncio.sleep(0)  # it has gone, and its looking may not have ended yet
        place.cancel(place.job_ids[1])
        assert await watcher.wait(place.job_ids[1], job_reader.at_rest, 20.0)

    run(play)


def test_a_store_that_cannot_tell_of_writes_is_asked_at_every_look(place: Place) -> None:
    async def play() -> None:
        tasks = await place.calls(place.reader(Unsure()))
        await until(lambda: len([ids for ids in place.statuses if len(ids) == MANY]) > 3)
        place.cancel(place.job_ids[0])
        assert (await tasks[0]).state is State.CANCELLED
        assert not any(task.done() for task in tasks[1:])
        place.stops.append(True)
        await asyncio.wait(tasks)

    run(play)


@pytest.mark.parametrize("hints", [True, False])
def test_a_write_is_heard_with_hints_and_without(
    place: Place, monkeypatch: pytest.MonkeyPatch, hints: bool
) -> None:
    watch = Watch(place.db)
    if not hints:
        watch.hint = None
    elif watch.hint is None:
        pytest.skip("there are no hints here")
    else:
        monkeypatch.setattr(db_module, "SELDOM_S", 60.0)  # nobody looks without one
    heard, hear = [], watch.hear
    watch.hear = lambda: heard.append(1) or hear()  # type: ignore[method-assign,func-returns-value]

    async def play() -> None:
        task = place.call(place.reader(watch), place.job_ids[0])
        await until(lambda: bool(place.statuses))
        await asyncio.sleep(0.1)
        heard.clear()
        place.cancel(place.job_ids[0])
        assert (await asyncio.wait_for(task, 15)).state is State.CANCELLED  # else after 20 s
        assert bool(heard) is hints

    run(play)


def test_a_job_that_is_forgotten_is_waited_for_no_longer(place: Place) -> None:
    async def play() -> None:
        tasks = await place.calls(place.reader())
        with place.db.write() as c:
            c.execute(sa.delete(jobs).where(jobs.c.id == place.job_ids[0]))
        with pytest.raises(UnknownRequest):
            await tasks[0]
        place.stops.append(True)
        await asyncio.wait(tasks)

    run(play)


def test_who_waits_for_a_store_in_trouble_hears_of_it(place: Place) -> None:
    async def play() -> None:
        tasks = await place.calls(place.reader())
        with place.db.write() as c:
            c.exec_driver_sql("ALTER TABLE progress RENAME TO elsewhere")
        done, _ = await asyncio.wait(tasks)
        assert {type(task.exception()) for task in done} == {sa.exc.OperationalError}

    run(play)


def test_a_stream_is_woken_by_what_it_tells(place: Place) -> None:
    async def play() -> None:
        watcher = place.watcher()
        with place.db.write() as c:
            [job] = queue.claim(c, "w", ["m"], 1, time.time())
        before = job.status
        assert before == JobStatus(State.PROCESSING, 1)
        waits = asyncio.create_task(watcher.wait(job.id, lambda now: now != before, 20.0))
        await until(lambda: bool(place.statuses))
        await place.nothing(3)
        assert not waits.done()
        with place.db.write() as c:
            queue.beat(c, "w", time.time(), time.time(), "m", {job.id: JobReport(1, 5)})
        assert await waits
        with place.db.read() as c:
            assert queue.read(c, [job.id])[job.id].status == JobStatus(State.PROCESSING, 1, 5)

    run(play)


def test_counts_stand_still_while_a_job_rests(place: Place) -> None:
    """Its row says all calls are made, its progress how many; nobody is woken by that."""
    with place.db.write() as c:
        [job] = queue.claim(c, "w", ["m"], 1, time.time())
        queue.beat(c, "w", time.time(), time.time(), "m", {job.id: JobReport(1, 5)})
        assert queue.finish(c, job, "w", {"images": []}, time.time(), KEEP_S)
    with place.db.read() as c:
        found = queue.read(c, [job.id])[job.id]
        assert progress.statuses(c, [job.id]) == {job.id: found.status}
    assert found.calls_done == found.unet_calls


@pytest.mark.parametrize(
    ("took_s", "rest_s"), [(0.0, 0.0), (0.005, REST * 0.005), (9.0, MAX_REST_S)]
)
def test_a_read_that_takes_long_is_followed_by_a_rest(
    place: Place, monkeypatch: pytest.MonkeyPatch, took_s: float, rest_s: float
) -> None:
    clock = [0.0]

    def slow(_: Any) -> dict[str, JobStatus]:
        clock[0] += took_s
        return {}

    monkeypatch.setattr(job_watcher, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    watcher = JobWatcher(ResponseCache(Watch(place.db)), slow, lambda: False)
    asyncio.run(watcher._poll())  # which hears of the writes up to now
    watcher._new.add("x")
    assert asyncio.run(watcher._poll()) == pytest.approx(rest_s)
    assert asyncio.run(watcher._poll()) == 0.0  # and with nothing written there is nothing to read
