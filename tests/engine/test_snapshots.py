"""Workers that stop, die or give way: what was made is not made again."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from safetensors.torch import load

from imaged.catalogue.model import Model
from imaged.engine.engine import Engine
from imaged.engine.outcome import Progress
from imaged.engine.snapshot import WHOLE, RunPlan
from imaged.jobs import MAX_ATTEMPTS, Job, State
from imaged.store.blobs import Blobs
from imaged.store.jobs import queue
from imaged.store.jobs.model_demand import FirstWaiting
from imaged.worker.jobs import claiming, preemption
from imaged.worker.jobs.held import HeldJob
from imaged.worker.jobs.preemption import MAX_PREEMPTIONS
from imaged.worker.snapshots import Snapshots
from tests.engine.test_worker import SMALL, Bench, working
from tests.mutants import red

A_JOB = Job("0" * 32, 1, "m", SMALL, State.PROCESSING, 1, 1, "w", 100, *(None,) * 6, None)  # type: ignore[arg-type]
IN_THREAD = ThreadPoolExecutor(1)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, RunPlan]]:
    """What engines were given, in order."""
    given, submit = list[tuple[str, RunPlan]](), Engine.submit

    def noted(
        self: Engine, job_id: str, params: Any, key_id: int = 0, resume_plan: RunPlan = WHOLE
    ) -> None:
        given.append((job_id, resume_plan))
        submit(self, job_id, params, key_id, resume_plan)

    monkeypatch.setattr(Engine, "submit", noted)
    return given


def done(bench: Bench, *job_ids: str) -> bool:
    return all(bench.job(job_id).state is State.COMPLETED for job_id in job_ids)


def picture(bench: Bench, job_id: str) -> bytes:
    result = bench.job(job_id).result
    assert result is not None
    file: Path = bench.files / job_id[:2] / result["images"][0]["name"]
    return file.read_bytes()


def states(bench: Bench, job_id: str) -> list[str]:
    return Blobs(f"file://{bench.files}").snapshots_of(job_id)


def behind(resume_plan: RunPlan) -> int:
    """UNet calls that a course goes on after."""
    [content] = resume_plan.snapshots.values()
    return len(load(content)["outputs"])


def test_a_worker_that_stops_parks_what_it_cannot_finish(
    tmp_path: Path, begun: list[tuple[str, RunPlan]]
) -> None:
    with working(tmp_path) as bench:
        bench.at_call(15, lambda: stop(bench))
        job_id = bench.put(SMALL)
        bench.wait(bench.worker.time_up.is_set)
    with working(tmp_path) as bench:
        bench.wait(lambda: done(bench, job_id))
        fresh = bench.put(SMALL)
        bench.wait(lambda: done(bench, fresh))
        assert picture(bench, job_id) == picture(bench, fresh)
        assert bench.job(job_id).attempts == 1
        assert states(bench, job_id) == []
    assert [job for job, _ in begun] == [job_id, job_id, fresh]
    assert behind(begun[1][1]) == 15


def stop(bench: Bench) -> None:
    bench.worker.stop(drain_s=0.0)
    bench.worker.time_up.wait()


def test_what_is_under_way_is_saved(tmp_path: Path, begun: list[tuple[str, RunPlan]]) -> None:
    """A worker that dies costs at most what was made since."""

    def lose() -> None:
        bench.wait(lambda: bool(states(bench, job_id)))
        with bench.db.write() as c:  # as when it is silent for longer than its lease
            queue.end_lease(c, "w", time.time(), 60.0, blame=True)

    with working(tmp_path, park_s=0.001) as bench:
        bench.at_call(10, lose)
        job_id = bench.put(SMALL)
        bench.wait(lambda: done(bench, job_id))
        assert bench.job(job_id).attempts == 2
        fresh = bench.put(SMALL)
        bench.wait(lambda: done(bench, fresh))
        assert picture(bench, job_id) == picture(bench, fresh)
    assert 0 < behind(begun[1][1]) <= 10


@pytest.mark.slow
def test_a_mutant_that_saves_nothing_is_seen(
    tmp_path: Path, begun: list[tuple[str, RunPlan]]
) -> None:
    with red(Snapshots, "save", lambda *_: None, raises=ValueError):  # no state to look into
        test_a_worker_that_stops_parks_what_it_cannot_finish(tmp_path, begun)


@pytest.fixture
def attentive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers look at what waits before every call, and not only twice a second."""
    monkeypatch.setattr(claiming, "POLL_S", 0.0)


def in_which_order(tmp_path: Path, steps: int, count: int) -> tuple[str, list[str], list[str]]:
    """(a long job, short ones, all as they were done) of a worker with one slot."""
    short, shorts = replace(SMALL, num_inference_steps=4), list[str]()

    def come() -> None:
        shorts.extend(bench.put(short, cost=1) for _ in range(count))

    with working(tmp_path, slots=1) as bench:
        bench.at_call(5, come)
        long = bench.put(replace(SMALL, num_inference_steps=steps))
        bench.wait(lambda: len(shorts) == count and done(bench, long, *shorts))
        jobs = [bench.job(job_id) for job_id in (long, *shorts)]
        order = sorted(jobs, key=lambda job: job.finished_at or 0)
        assert all(job.attempts == 1 for job in jobs)
        return long, shorts, [job.id for job in order]


def test_a_short_job_does_not_wait_for_long_ones(
    tmp_path: Path, begun: list[tuple[str, RunPlan]], attentive: None
) -> None:
    long, [short], order = in_which_order(tmp_path, 20, 1)
    assert order == [short, long]
    assert [job_id for job_id, _ in begun] == [long, short, long]
    assert behind(begun[2][1]) >= 5


def under_way(job: Job, share: float) -> HeldJob:
    """A job of whose UNet calls this share is made."""
    made = {job.id: Progress(round(100 * share), 100, None)}
    model, engine = cast(Model, None), cast(Engine, SimpleNamespace(progress=lambda: made))
    return HeldJob(job, model, engine)


def test_who_gives_way_to_whom() -> None:
    long, other = under_way(A_JOB, 0.2), under_way(replace(A_JOB, id="b"), 0.6)
    waiting = [FirstWaiting("m", 0.0, 0.0, work) for work in (21, 20, 1)]
    assert preemption.choose([other, long], waiting) == (long, waiting[1])
    assert preemption.choose([other], waiting) == (other, waiting[2])
    assert preemption.choose([other, long], waiting[:1]) is None
    assert preemption.choose([long], []) is preemption.choose([], waiting) is None
    often = replace(A_JOB, epoch=1 + MAX_PREEMPTIONS)
    assert preemption.choose([under_way(often, 0.2)], waiting) is None
    assert preemption.choose([under_way(replace(often, epoch=MAX_PREEMPTIONS), 0.2)], waiting)
    crashed = replace(A_JOB, attempts=2, epoch=2)  # it runs alone
    assert preemption.choose([under_way(crashed, 0.2)], waiting) is None
    assert preemption.choose([replace(long, engine=None)], waiting) is None


@pytest.mark.slow
def test_a_mutant_that_never_gives_way_is_seen(
    tmp_path: Path, attentive: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "PREEMPT_RATIO", 1e9)
    _, [short], order = in_which_order(tmp_path, 20, 1)
    assert order[0] != short


@pytest.mark.slow
def test_a_long_job_gives_way_so_often_and_no_more(
    tmp_path: Path, begun: list[tuple[str, RunPlan]], attentive: None
) -> None:
    long, _, order = in_which_order(tmp_path, 100, MAX_PREEMPTIONS + 2)
    assert sum(job_id == long for job_id, _ in begun) == 1 + MAX_PREEMPTIONS
    assert order[MAX_PREEMPTIONS] == long


def test_at_last_a_job_begins_anew(tmp_path: Path) -> None:
    """In case it is its state that ends workers."""
    parking = Snapshots(Blobs(f"file://{tmp_path}"), 1.0, IN_THREAD)
    job = replace(A_JOB, epoch=2, attempts=2)
    parking.save(job, {0: b"a state"})
    assert parking.resume_plan(job).snapshots == {0: b"a state"}
    assert parking.resume_plan(replace(job, attempts=MAX_ATTEMPTS)).snapshots == {}
    assert parking.resume_plan(replace(job, epoch=1, attempts=1)).snapshots == {}


def test_the_newest_state_counts(tmp_path: Path) -> None:
    parking = Snapshots(Blobs(f"file://{tmp_path}"), 1.0, IN_THREAD)
    job = replace(A_JOB, epoch=2, attempts=2)
    for epoch in (2, 10, 9):
        parking.save(replace(job, epoch=epoch), {0: str(epoch).encode()})
    parking.save(replace(job, epoch=8), {1: b"other"})
    assert parking.resume_plan(replace(job, epoch=11)).snapshots == {0: b"10", 1: b"other"}


def test_when_it_is_time_to_save() -> None:
    blobs: Any = None
    parking = Snapshots(blobs, 10.0, IN_THREAD)
    a, b = (cast(HeldJob, SimpleNamespace(job=SimpleNamespace(id=id))) for id in "ab")
    assert parking.due([a], 0.0) == parking.due([a], 9.9) == []
    assert parking.due([a], 10.0) == [a]
    assert parking.due([a, b], 12.0) == parking.due([a, b], 19.9) == []
    assert parking.due([a, b], 20.0) == [a]
    assert Snapshots(blobs, 0.0, IN_THREAD).due([a, b], 1e9) == []
