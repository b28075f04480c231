"""The worker's loop in this process, on a real store and the real checkpoint at 128 px."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from PIL import Image

from imaged.catalogue.model import DEFAULT_SLUG, Model
from imaged.jobs import Job, Preview, State, new_job_id
from imaged.params.image_params import ImageParams
from imaged.settings import Settings
from imaged.store import catalogue
from imaged.store.accounts import keys
from imaged.store.blobs import Blobs
from imaged.store.jobs import progress, queue
from imaged.store.sql.database import Database
from imaged.store.sql.schema import ledger
from imaged.worker.deliver import Delivery
from imaged.worker.heartbeat import Heartbeat
from imaged.worker.loop import Worker
from imaged.worker.openmp import waiting
from tests.conftest import store, until
from tests.in_store import asking

SMALL = ImageParams("a house", num_inference_steps=20, seed=1, img_width=128, img_height=128)


@dataclass
class Bench:
    """A worker whose loop runs in a thread, and somebody else's connection to its store."""

    worker: Worker
    db: Database
    key_id: int
    files: Path
    model: Model  # the default one

    def put(
        self,
        params: ImageParams,
        job_id: str = "",
        model: str = DEFAULT_SLUG,
        cost: int = 10,
        **more: Any,
    ) -> str:
        asked = asking(self.key_id, cost, model, params, **more)
        with pytest.MonkeyPatch.context() as patch, self.db.write() as c:
            if job_id:
                patch.setattr(queue, "new_job_id", lambda: job_id)
            return queue.put(c, asked, time.time()).job_id

    def job(self, job_id: str) -> Job:
        with self.db.read() as c:
            return queue.read(c, [job_id])[job_id]

    def wait(self, what: Callable[[], bool]) -> None:
        until(what, 60, every_s=0.01)

    def at_call(self, number: int, act: Callable[[], object]) -> None:
        """Have the loop itself do something as it makes this call of the one UNet at hand."""
        [engine] = self.worker.checkpoints
        add, made = engine.device_time.add, count(1)

        def counted(images: Any, work: int, began: Any) -> None:
            if next(made) == number:
                act()
            add(images, work, began)

        engine.device_time.add = counted  # type: ignore[method-assign]

    def kinds(self, job_id: str) -> list[str]:
        """What happened to the job's money."""
        with self.db.read() as c:
            rows = c.execute(sa.select(ledger.c.kind).where(ledger.c.job_id == job_id))
            return [row.kind for row in rows]


@contextmanager
def opened(folder: Path, *others: Model, **given: Any) -> Iterator[Bench]:
    """A worker that has yet to run; `others` are on offer beside the default model."""
    settings = Settings(data=folder, **given)
    db, own = store(folder / "imaged.db"), Database(settings.database)
    with db.write() as c:
        key = keys.create(c, b"s" * 32, 0.0, name="t", credits_micros=100_000, rpm=100_000)
        found = keys.find(c, b"s" * 32, key)
        assert found is not None
        for other in others:
            catalogue.add(
                c,
                other.slug,
                {"checkpoint": str(other.checkpoint), "sha256": other.weights.sha256},
                0.0,
            )
        model = catalogue.catalogue(c)[DEFAULT_SLUG]
    heartbeat = Heartbeat(own, "w")
    worker = Worker(
        "w", own, Delivery(own, Blobs(settings.blobs), "w", settings), heartbeat, settings
    )
    heartbeat.start()
    try:
        yield Bench(worker, db, found.id, folder / "files", model)
    finally:
        heartbeat.stop()
        with own.write() as c:  # as main.py does
            queue.end_lease(c, "w", time.time(), 60.0, blame=False)
        db.close()
        own.close()


@contextmanager
def working(folder: Path, *others: Model, **given: Any) -> Iterator[Bench]:
    """The same with the default model's checkpoint loaded, running in a thread."""
    with opened(folder, *others, **given) as bench:
        bench.worker.load_and_wait(bench.model)
        thread = threading.Thread(target=bench.worker.run)
        thread.start()
        try:
            yield bench
        finally:
            bench.worker.stop(drain_s=0.0)
            thread.join()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with working(tmp_path) as bench:
        yield bench


def engine_of(bench: Bench) -> Any:
    [engine] = bench.worker.checkpoints
    return engine


def calls_after_a_cancel(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> int:
    """UNet calls that are made once another process has cancelled the job."""
    engine = engine_of(bench)
    add, made = engine.device_time.add, 0

    def counted(chosen: Any, *given: Any) -> None:
        nonlocal made
        made += 1
        if made == 5:
            with bench.db.write() as c:
                queue.cancel(c, chosen[0].job_id, time.time(), 60.0)
        add(chosen, *given)

    monkeypatch.setattr(engine.device_time, "add", counted)
    job_id = bench.put(SMALL)
    bench.wait(lambda: bench.job(job_id).state is State.CANCELLED and engine.idle)
    time.sleep(0.3)
    assert bench.kinds(job_id) == ["reserve", "release"]
    return made - 5


def test_a_cancel_is_heard_before_the_next_call(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calls_after_a_cancel(bench, monkeypatch) == 0


def test_the_heartbeat_alone_would_hear_of_it_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "lost", lambda *_: set())
    monkeypatch.setattr(queue, "beat", lambda *_: set())
    engine = engine_of(bench)
    add, made, cancelled = engine.device_time.add, 0, threading.Event()

    def counted(*given: Any) -> None:
        nonlocal made
        made += cancelled.is_set()
        add(*given)

    monkeypatch.setattr(engine.device_time, "add", counted)
    job_id = bench.put(SMALL)
    bench.wait(lambda: job_id in engine.progress())
    with bench.db.write() as c:
        queue.cancel(c, job_id, time.time(), 60.0)
    cancelled.set()
    bench.wait(lambda: engine.idle)
    assert made > 1


def test_the_loop_goes_on_while_a_picture_is_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a job that is lost while it is written, and claimed again, is charged once."""
    delivery = bench.worker.delivery
    deliver, first, gate = delivery.deliver, threading.Event(), threading.Event()

    def slow(job: Job, *rest: Any) -> None:
        if not first.is_set():
            first.set()
            assert gate.wait(30)
        deliver(job, *rest)

    monkeypatch.setattr(delivery, "deliver", slow)
    lost = bench.put(SMALL)
    assert first.wait(60)
    other = bench.put(SMALL)
    bench.wait(lambda: bench.job(other).calls_done > 0 or not engine_of(bench).idle)
    again = "UPDATE jobs SET state = 'QUEUED', worker_id = NULL, attempts = 0 WHERE id = :id"
    with bench.db.write() as c:  # as after an orderly stop
        c.execute(sa.text(again), {"id": lost})
    bench.wait(lambda: bench.job(lost).epoch == 2)
    gate.set()
    bench.wait(lambda: bench.job(lost).state.final and bench.job(other).state.final)
    assert bench.job(lost).state is State.COMPLETED
    assert bench.kinds(lost) == ["reserve", "settle"] == bench.kinds(other)
    bench.wait(lambda: len(list(bench.files.rglob(f"{lost}-*"))) == 1)
    [file] = bench.files.rglob(f"{lost}-*")
    assert file.name == f"{lost}-2-0.jpeg"


def test_no_more_jobs_are_taken_than_pictures_can_be_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checker or a disk that is slower than the engine must not fill the memory."""
    delivery, slots, gate = bench.worker.delivery, bench.worker.settings.slots, threading.Event()
    deliver = delivery.deliver

    def slow(*given: Any) -> None:
        assert gate.wait(60)
        deliver(*given)

    monkeypatch.setattr(delivery, "deliver", slow)
    quick = replace(SMALL, num_inference_steps=2)
    ids = [bench.put(quick) for _ in range(3 * slots)]
    bench.wait(lambda: len(bench.worker.deliveries.jobs) >= slots and engine_of(bench).idle)
    time.sleep(0.3)
    waiting = sum(bench.job(job_id).state is State.QUEUED for job_id in ids)
    assert waiting >= slots
    gate.set()
    bench.wait(lambda: all(bench.job(job_id).state is State.COMPLETED for job_id in ids))


def test_results_say_what_made_them(bench: Bench) -> None:
    job_id = bench.put(SMALL)
    bench.wait(lambda: bench.job(job_id).state is State.COMPLETED)
    result = bench.job(job_id).result
    assert result is not None
    assert (result["checkpoint"], result["determinism"]) == ("micro", "exact")
    assert result["device"].startswith("CPU ") and result["engine"]


def completed(bench: Bench, job_id: str) -> bool:
    return bench.job(job_id).state is State.COMPLETED


def test_a_picture_is_made_again_in_its_own_types(bench: Bench) -> None:
    """Beside those of its model, whose checkpoint stays."""
    tiny, mixed = replace(SMALL, num_inference_steps=4), "bfloat16 and float32"
    results = []
    for made_in in (None, f"cpu {mixed}", "cpu float32", None):
        job_id = bench.put(tiny, made_in=made_in)
        bench.wait(partial(completed, bench, job_id))
        result = bench.job(job_id).result
        assert result is not None
        results.append(result)
    assert [result["dtype"] for result in results] == ["float32", mixed, "float32", "float32"]
    made = [result["images"][0]["receipt"]["picture"] for result in results]
    assert made[0] == made[2] == made[3] != made[1]
    assert len(list(bench.worker.checkpoints)) == 2


def test_a_full_disk_fails_its_job_for_nothing_and_the_worker_goes_on(tmp_path: Path) -> None:
    """Nothing is saved on the way, however slow it is: that would be written there first."""
    with working(tmp_path, park_s=0.0) as bench:
        job_id = new_job_id()
        folder = bench.files / job_id[:2]
        folder.mkdir(parents=True)
        second = folder / f"{job_id}-1-1.{os.getpid()}.part"
        second.symlink_to("/dev/full")  # what is written there finds no room
        bench.put(replace(SMALL, samples=2), job_id)
        bench.wait(lambda: bench.job(job_id).state is State.FAILED)
        assert bench.job(job_id).reason == "storage_full"
        assert bench.kinds(job_id) == ["reserve", "release"]
        assert not list(folder.iterdir())
        after = bench.put(SMALL)
        bench.wait(lambda: bench.job(after).state is State.COMPLETED)


def test_a_folder_of_another_user_fails_its_job_likewise(bench: Bench) -> None:
    job_id = new_job_id()
    bench.files.mkdir(exist_ok=True)
    (bench.files / job_id[:2]).write_text("in the way, for root too")
    bench.put(SMALL, job_id)
    bench.wait(lambda: bench.job(job_id).state is State.FAILED)
    assert bench.job(job_id).reason == "storage_failed"
    assert bench.kinds(job_id) == ["reserve", "release"]


def test_a_job_can_be_looked_at_while_it_runs(bench: Bench) -> None:
    def look() -> Preview | None:
        with bench.db.read() as c:
            return progress.previews(c, [job_id]).get(job_id)

    bench.at_call(12, lambda: bench.wait(lambda: look() is not None))  # as one that takes long
    job_id = bench.put(SMALL)
    bench.wait(lambda: look() is not None)
    seen = look()
    assert seen is not None and 0 < seen.call < 12
    with Image.open(io.BytesIO(seen.jpeg)) as image:
        assert image.format == "JPEG" and min(image.size) >= 16
        assert len(image.convert("RGB").getcolors(1 << 16) or []) > 10
    bench.wait(lambda: bench.job(job_id).state is State.COMPLETED)
    assert look() is None


@pytest.mark.parametrize(
    ("workers", "threads", "environ", "awake"),
    [
        (1, 0, {}, True),  # one worker with a thread for each core
        (2, 0, {}, False),
        (1, 4, {}, True),
        (1, 5, {}, False),
        (2, 2, {}, True),
        (3, 2, {}, False),
        (4, 0, {"OMP_NUM_THREADS": "1"}, True),
        (5, 0, {"OMP_NUM_THREADS": "1"}, False),
        (1, 0, {"OMP_NUM_THREADS": "4,2"}, True),  # not ours to read
    ],
)
def test_threads_wait_awake_only_where_there_are_cores_for_all(
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    threads: int,
    environ: dict[str, str],
    awake: bool,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert ("GOMP_SPINCOUNT" in waiting(workers, threads, environ)) is awake
    assert waiting(workers, threads, {**environ, "OMP_WAIT_POLICY": "ACTIVE"}) == {}


def test_a_claim_takes_its_time_with_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that came while the worker waited for the lock is over its Cancel-After by then."""
    with opened(tmp_path) as bench:
        first, late = bench.put(SMALL), list[str]()
        write = bench.worker.db.write

        @contextmanager
        def after_another() -> Iterator[sa.Connection]:
            late.append(bench.put(SMALL, cancel_after_s=1e-9))
            with write() as c:
                yield c

        monkeypatch.setattr(bench.worker.db, "write", after_another)
        claimed = [job for job, _ in bench.worker.claim()]
        monkeypatch.undo()
        assert [job.id for job in claimed] == [first]
        assert bench.job(late[0]).state is State.QUEUED
        assert all(job.started_at and job.started_at >= job.created_at for job in claimed)
