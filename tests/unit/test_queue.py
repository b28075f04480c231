"""The queue on a real database: moves, fences, fairness, clocks; in any order of events."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast
from uuid import uuid4

import pytest
import sqlalchemy as sa
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from imaged.errors import NoCredits
from imaged.jobs import (
    FINAL,
    MAX_ATTEMPTS,
    MOVES,
    Job,
    JobReport,
    State,
)
from imaged.store.accounts import keys
from imaged.store.jobs import queue
from imaged.store.sql.database import Database
from imaged.store.sql.schema import jobs
from tests.conftest import store
from tests.in_store import KEEP_S, RESULT, audit, claim, free, get, make_key, put, worker

# -- a late worker ----------------------------------------------------------------------------


def zombie_writes(db: Database) -> bool:
    """A worker loses its job to another and then reports; True if the late report counted."""
    key_id = make_key(db)
    job_id = put(db, key_id)
    worker(db, "old", now=1.0)
    [stale] = claim(db, "old")
    with db.write() as c:
        queue.reap(c, 100.0, lease_s=10, queue_s=1e6, run_s=1e6, retention_s=KEEP_S)
    worker(db, "new", now=100.0)
    [_] = claim(db, "new", now=101.0)
    with db.write() as c:
        counted = queue.finish(c, stale, "old", RESULT, 102.0, KEEP_S)
    assert counted == (get(db, job_id).state is State.COMPLETED)
    return counted


def test_late_worker_is_fenced(db: Database) -> None:
    assert not zombie_writes(db)


def test_mutant_without_fence_is_seen(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither epoch nor worker are looked at."""
    running = jobs.c.state == State.PROCESSING
    monkeypatch.setattr(queue, "still_held", lambda job, _: sa.and_(jobs.c.id == job.id, running))
    assert zombie_writes(db)


# -- fairness, leases, clocks -----------------------------------------------------------------


def test_claimers_never_share_a_job(db: Database) -> None:
    key_id = make_key(db, credits_micros=10**6)
    ids = {put(db, key_id) for _ in range(60)}
    for n in range(4):
        worker(db, f"w{n}")

    def all_of(name: str) -> list[str]:
        taken: list[str] = []
        while got := claim(db, name, limit=3):
            taken += [job.id for job in got]
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = [id for part in pool.map(all_of, [f"w{n}" for n in range(4)]) for id in part]
    assert sorted(taken) == sorted(ids)


def test_concurrent_finishes_count_once(db: Database) -> None:
    key_id = make_key(db)
    put(db, key_id)
    worker(db)
    [job] = claim(db)

    def finish(_: int) -> bool:
        with db.write() as c:
            return queue.finish(c, job, "w", RESULT, 3.0, KEEP_S)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(finish, range(8))) == 1
    assert audit(db) == []


def test_a_small_key_does_not_wait_behind_a_flood(db: Database) -> None:
    flood, small = make_key(db, 10**9), make_key(db, 10**9)
    for _ in range(50):
        put(db, flood, cost=10_000)
    mine = [put(db, small, cost=10_000) for _ in range(3)]
    worker(db)
    order = [claim(db, limit=1)[0].id for _ in range(10)]
    assert set(mine) <= set(order)


def test_poison_job_fails_after_its_attempts(db: Database) -> None:
    key_id = make_key(db)
    job_id = put(db, key_id)
    for n in range(MAX_ATTEMPTS):
        worker(db, f"w{n}")
        assert len(claim(db, f"w{n}")) == 1
        with db.write() as c:
            queue.end_lease(c, f"w{n}", 3.0, KEEP_S, blame=True)
    assert (get(db, job_id).state, get(db, job_id).reason) == (State.FAILED, "worker_lost")
    assert free(db, key_id) == 1000


def test_orderly_release_does_not_count(db: Database) -> None:
    job_id = put(db, make_key(db))
    for n in range(MAX_ATTEMPTS + 2):
        worker(db, f"w{n}")
        assert len(claim(db, f"w{n}")) == 1
        with db.write() as c:
            queue.end_lease(c, f"w{n}", 3.0, KEEP_S, blame=False)
    assert get(db, job_id).state is State.QUEUED


def test_clocks(db: Database) -> None:
    key_id = make_key(db)
    waits, runs = put(db, key_id, now=0.0), put(db, key_id, model="other", now=0.0)
    worker(db, now=50.0)
    with db.write() as c:
        queue.claim(c, "w", ["other"], 1, 50.0)
        queue.reap(c, 55.0, lease_s=10, queue_s=100, run_s=1, retention_s=KEEP_S)
    assert (get(db, runs).reason, get(db, waits).state) == ("timeout", State.QUEUED)
    with db.write() as c:
        queue.reap(c, 101.0, lease_s=100, queue_s=100, run_s=100, retention_s=KEEP_S)
    assert get(db, waits).reason == "queue_timeout"
    assert free(db, key_id) == 1000


def test_beat_keeps_the_lease_tells_progress_and_losses(db: Database) -> None:
    key_id = make_key(db)
    kept, lost = put(db, key_id), put(db, key_id)
    worker(db)
    claim(db)
    with db.write() as c:
        queue.cancel(c, lost, 3.0, KEEP_S)
        assert queue.beat(
            c, "w", 3.0, 3.0, "micro", {kept: JobReport(1, 7), lost: JobReport(1, 2)}
        ) == {lost}
        assert queue.beat(c, "w", 4.0, 4.0, "micro", {kept: JobReport(0, 9)}) == {
            kept
        }  # another epoch
        assert queue.beat(c, "nobody", 4.0, 4.0, None, {}) is None
    assert get(db, kept).calls_done == 7


def test_a_job_that_saw_a_worker_die_runs_by_itself(db: Database) -> None:
    key_id = make_key(db)
    first, second, third = (put(db, key_id) for _ in range(3))
    worker(db)
    assert [j.id for j in claim(db, limit=2)] == [first, second]
    with db.write() as c:
        queue.end_lease(c, "w", 3.0, KEEP_S, blame=True)
    worker(db, "v")
    with db.write() as c:
        assert queue.claim(c, "v", ["m"], 4, 4.0, alone=False) == []
    assert [j.id for j in claim(db, "v", 4)] == [first]
    assert [j.id for j in claim(db, "v", 4)] == [second]
    assert [j.id for j in claim(db, "v", 4)] == [third]


def test_the_queue_deadline_begins_anew_when_a_job_is_given_back(db: Database) -> None:
    key_id = make_key(db)
    job_id = put(db, key_id, now=1.0)
    worker(db)
    claim(db, now=4000.0)
    with db.write() as c:
        queue.end_lease(c, "w", 4010.0, KEEP_S, blame=False)
        limits = {"lease_s": 10.0, "queue_s": 3600.0, "run_s": 1800.0, "retention_s": KEEP_S}
        queue.reap(c, 4020.0, **limits)
    assert get(db, job_id).state is State.QUEUED
    with db.write() as c:
        queue.reap(c, 7700.0, **limits)
    assert get(db, job_id).reason == "queue_timeout"


@pytest.mark.parametrize("begun", [True, False])
def test_a_job_that_gives_way_has_not_waited_in_vain(db: Database, begun: bool) -> None:
    """Neither by its own deadline nor by the server's; one that never began still may."""
    key_id = make_key(db)
    job_id = put(db, key_id, cancel_after_s=30.0)
    with db.write() as c:
        queue.register(c, "w", 1, "here", 5.0)
        [job] = queue.claim(c, "w", ["m"], 1, 5.0)
        queue.give_back(c, job, "w", 200.0, 60.0, begun=begun)
        queue.reap(c, 201.0, lease_s=1e6, queue_s=60.0, run_s=1e6, retention_s=60.0)
        assert queue.read(c, [job_id])[job_id].state is (State.QUEUED if begun else State.FAILED)


# -- any order of events ----------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Random submits, claims, finishes, deaths, cancels and expiries; money always adds up."""

    make: Callable[[], Database]

    def __init__(self) -> None:
        super().__init__()
        self.db = type(self).make()
        self.now = 1.0
        self.key = make_key(self.db, credits_micros=200)
        self.held: list[tuple[str, Job]] = []
        self.states: dict[str, State] = {}

    def tick(self) -> float:
        self.now += 1
        return self.now

    @rule()
    def submit(self) -> None:
        try:
            put(self.db, self.key, cost=30, now=self.tick())
        except NoCredits:
            assert free(self.db, self.key) < 30

    @rule(name=st.sampled_from(["a", "b"]))
    def work(self, name: str) -> None:
        with self.db.write() as c:
            if queue.beat(c, name, self.now, self.now, "micro", {}) is None:
                queue.register(c, name, 1, "h", self.now)
            jobs = queue.claim(c, name, ["m"], 2, self.tick())
        self.held += [(name, job) for job in jobs]

    @rule(n=st.integers(0, 5), fails=st.booleans())
    def report(self, n: int, fails: bool) -> None:
        """Any report that was ever due, also late and repeated ones."""
        if self.held:
            name, job = self.held[n % len(self.held)]
            with self.db.write() as c:
                if fails:
                    queue.fail(c, job, name, "engine_error", "x", self.tick(), 20.0)
                else:
                    queue.finish(c, job, name, RESULT, self.tick(), 20.0)

    @rule(name=st.sampled_from(["a", "b"]), blame=st.booleans())
    def die(self, name: str, blame: bool) -> None:
        with self.db.write() as c:
            queue.end_lease(c, name, self.tick(), 20.0, blame=blame)

    @rule(n=st.integers(0, 5))
    def cancel(self, n: int) -> None:
        if self.held:
            with self.db.write() as c:
                queue.cancel(c, self.held[n % len(self.held)][1].id, self.tick(), 20.0)

    @rule(leap=st.sampled_from([1.0, 12.0, 60.0]))
    def time_passes(self, leap: float) -> None:
        self.now += leap
        with self.db.write() as c:
            queue.reap(c, self.now, lease_s=10, queue_s=50, run_s=30, retention_s=20.0)
            queue.delete_expired(c, self.now)

    @invariant()
    def money_adds_up(self) -> None:
        assert audit(self.db) == []
        assert free(self.db, self.key) >= 0

    @invariant()
    def reservations_are_open_jobs(self) -> None:
        with self.db.read() as c:
            open_cost = c.execute(
                sa.select(sa.func.coalesce(sa.func.sum(jobs.c.cost_micros), 0)).where(
                    jobs.c.state.in_(("QUEUED", "PROCESSING"))
                )
            ).scalar_one()
            [row] = keys.rows(c)
        assert row.reserved_micros == open_cost

    @invariant()
    def moves_are_legal(self) -> None:
        with self.db.read() as c:
            seen = {job.id: job.state for job in queue.newest(c, 1000)}
        for job_id, state in seen.items():
            before = self.states.get(job_id, State.QUEUED)
            steps = MOVES[before] | {before}
            reachable = steps | {s for step in steps for s in MOVES[step]}
            assert state in reachable, (before, state)
            assert not (before in FINAL and state is not before)
        self.states = seen

    def teardown(self) -> None:
        self.db.close()


@pytest.mark.parametrize("examples", [4, pytest.param(15, marks=pytest.mark.slow)])
def test_any_order_of_events(tmp_path: Path, examples: int) -> None:
    def make() -> Database:
        return cast(Database, store(tmp_path / f"{uuid4().hex}.db"))

    AnyOrder.make = staticmethod(make)
    machine, count = AnyOrder.TestCase, hypothesis_settings(max_examples=examples)
    machine.settings = hypothesis_settings(count, stateful_step_count=40, deadline=None)
    machine("runTest").runTest()
