"""Queue and ledger on a real database: moves, fences, races; each with its mutant."""

import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from imaged.catalogue.model import STANDARD_PRICE, Weights
from imaged.errors import NoCredits, TooFast
from imaged.jobs import (
    DEFAULT_OPTIONS,
    FINAL,
    MAX_ATTEMPTS,
    MOVES,
    Job,
    JobReport,
    RequestOptions,
    State,
    new_job_id,
)
from imaged.params.image_params import ImageParams
from imaged.params.knobs import KNOBS
from imaged.settings import Settings
from imaged.store import catalogue
from imaged.store.accounts import keys, ledger
from imaged.store.jobs import load_failures, model_demand, queue
from imaged.store.sql.database import Database
from imaged.store.sql.group_commit import Writer
from imaged.store.sql.schema import api_keys, jobs, metadata
from imaged.worker.supervisor import Supervisor, _Slot
from tests.conftest import store

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


def test_schema_is_what_the_migrations_make(db: Database) -> None:
    with db.read() as c:
        assert compare_metadata(MigrationContext.configure(c), metadata) == []


def test_sqlite_is_durable_and_not_in_the_corruption_range(db: Database) -> None:
    with db.read() as c:
        assert c.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert c.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        version = c.exec_driver_sql("SELECT sqlite_version()").scalar_one()
    assert tuple(map(int, version.split("."))) >= (3, 51, 3)


def test_finish_charges_once(db: Database) -> None:
    key_id = make_key(db)
    job_id = put(db, key_id, cost=300)
    assert free(db, key_id) == 700
    worker(db)
    [job] = claim(db)
    with db.write() as c:
        assert queue.finish(c, job, "w", RESULT, 3.0, KEEP_S)
    with db.write() as c:
        assert not queue.finish(c, job, "w", RESULT, 4.0, KEEP_S)
    done = get(db, job_id)
    assert (done.state, done.remaining_micros, free(db, key_id)) == (State.COMPLETED, 700, 700)
    assert audit(db) == []


def test_failure_and_cancel_give_the_money_back(db: Database) -> None:
    key_id = make_key(db)
    first, second = put(db, key_id), put(db, key_id)
    worker(db)
    [job] = claim(db, limit=1)
    with db.write() as c:
        assert queue.fail(c, job, "w", "nan_output", "text", 3.0, KEEP_S)
        assert queue.cancel(c, second, 3.0, KEEP_S)
        assert not queue.cancel(c, second, 3.0, KEEP_S)
    assert (get(db, first).reason, get(db, second).state) == ("nan_output", State.CANCELLED)
    assert free(db, key_id) == 1000
    assert audit(db) == []


def test_no_credits_changes_nothing(db: Database) -> None:
    key_id = make_key(db, credits_micros=25)
    put(db, key_id), put(db, key_id)
    with pytest.raises(NoCredits, match=r"costs 0\.000010 and 0\.000005 are left"):
        put(db, key_id)
    assert free(db, key_id) == 5
    assert audit(db) == []


def test_rate_limit_refills(db: Database) -> None:
    key_id = make_key(db, rpm=2)
    put(db, key_id, now=100.0), put(db, key_id, now=100.0)
    with pytest.raises(TooFast) as caught:
        put(db, key_id, now=101.0)
    assert caught.value.reset_at == pytest.approx(130.0)
    put(db, key_id, now=131.0)


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


# -- races over money -------------------------------------------------------------------------


def overspend_race(db: Database) -> tuple[int, int]:
    """32 threads with a balance for 10; how many got in, and what is free afterwards."""
    key_id = make_key(db, credits_micros=100)
    barrier = threading.Barrier(32)

    def one(_: int) -> bool:
        barrier.wait()
        try:
            put(db, key_id, cost=10)
        except (NoCredits, sa.exc.IntegrityError):
            return False
        return True

    with ThreadPoolExecutor(32) as pool:
        admitted = sum(pool.map(one, range(32)))
    return admitted, free(db, key_id)


def test_nobody_overspends(db: Database) -> None:
    assert overspend_race(db) == (10, 0)
    assert audit(db) == []


def test_mutant_check_then_deduct_is_stopped_by_the_schema(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a reserve that does not look at the balance cannot overspend: the CHECK refuses."""

    def careless(c: Any, key_id: int, job_id: str, amount: int, now: float) -> bool:
        c.execute(
            api_keys.update()
            .where(api_keys.c.id == key_id)
            .values(reserved_micros=api_keys.c.reserved_micros + amount)
        )
        ledger._write(c, key_id, job_id, "reserve", amount, now)
        return True

    monkeypatch.setattr(ledger, "reserve", careless)
    assert overspend_race(db) == (10, 0)
    with db.write() as c:  # and without the CHECK the same race is seen to overspend
        c.exec_driver_sql("PRAGMA ignore_check_constraints = ON")
        key_id = 1
        careless(c, key_id, new_job_id(), 1000, 1.0)
        assert ledger.free(c, key_id) < 0
        c.rollback()


def test_second_end_of_a_job_is_impossible(db: Database) -> None:
    key_id = make_key(db)
    job_id = put(db, key_id)
    with db.write() as c:
        ledger.settle(c, key_id, job_id, 10, 2.0, held_micros=10)
    for again in (partial(ledger.settle, held_micros=10), ledger.release):
        with pytest.raises(sa.exc.IntegrityError), db.write() as c:
            again(c, key_id, job_id, 10, 3.0)
    with pytest.raises(sa.exc.IntegrityError), db.write() as c:
        ledger.reserve(c, key_id, job_id, 10, 3.0)
    assert audit(db) == []


def test_audit_sees_a_wrong_balance(db: Database) -> None:
    key_id = make_key(db)
    with db.write() as c:
        c.execute(api_keys.update().values(balance_micros=999))
    assert f"key {key_id}" in audit(db)[0]


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


# -- fairness, leases, clocks -----------------------------------------------------------------


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
            queue.release(c, f"w{n}", 3.0, KEEP_S, blame=True)
    assert (get(db, job_id).state, get(db, job_id).reason) == (State.FAILED, "worker_lost")
    assert free(db, key_id) == 1000


def test_orderly_release_does_not_count(db: Database) -> None:
    job_id = put(db, make_key(db))
    for n in range(MAX_ATTEMPTS + 2):
        worker(db, f"w{n}")
        assert len(claim(db, f"w{n}")) == 1
        with db.write() as c:
            queue.release(c, f"w{n}", 3.0, KEEP_S, blame=False)
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


def test_expiry_forgets_jobs_but_not_money(db: Database) -> None:
    key_id = make_key(db)
    job_id = put(db, key_id)
    worker(db)
    [job] = claim(db)
    with db.write() as c:
        queue.finish(c, job, "w", RESULT, 10.0, 100.0)
        assert queue.expire(c, 109.0) == []
        assert [gone.id for gone in queue.expire(c, 111.0)] == [job_id]
        assert queue.read(c, [job_id]) == {}
    assert audit(db) == []


# -- keys, models, writer ---------------------------------------------------------------------


def test_keys_are_not_in_the_files(tmp_path: Path, db: Database) -> None:
    with db.write() as c:
        key = keys.create(c, SECRET, 0.0, name="n", credits_micros=5)
        found = keys.find(c, SECRET, key)
        assert found is not None
        assert keys.find(c, b"other secret", key) is None
        assert keys.find(c, SECRET, key + "0") is None
    assert key.startswith("SG_") and len(key) == 35
    everything = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert key.encode() not in everything
    with db.write() as c:
        keys.revoke(c, found.id, 1.0)
        assert keys.find(c, SECRET, key) is None


def test_added_model_takes_the_slug(db: Database) -> None:
    with db.write() as c:
        built_in = catalogue.catalogue(c)["sdxl1.0-yamers-realistic"]
        catalogue.add(c, built_in.slug, {"checkpoint": "/x/real.safetensors"}, 0.0)
        assert catalogue.catalogue(c)[built_in.slug].checkpoint_name == "real"
        catalogue.remove(c, built_in.slug)
        assert catalogue.catalogue(c)[built_in.slug].checkpoint_name == "micro"


@pytest.mark.parametrize("zero_snr", [None, False, True])
def test_all_that_was_said_of_weights_is_kept(db: Database, zero_snr: bool | None) -> None:
    said = {
        "vae": "/y",
        "dtype": "bf16",
        "cpu_dtype": "fp32",
        "prediction": "v_prediction",
        "sha256": "0" * 64,
        "title": "Own",
        "description": "It is.",
        "licence": "None.",
        "price": 0.25,
        "sample": {"prompt": "a house"},
    } | ({} if zero_snr is None else {"zero_snr": zero_snr})
    with db.write() as c:
        catalogue.add(c, "own", {"checkpoint": "/x", **said}, 0.0)
        catalogue.add(c, "plain", {"checkpoint": "/x"}, 0.0)
        found = catalogue.catalogue(c)
    own, plain = found["own"], found["plain"]
    weights = Weights(Path("/x"), Path("/y"), "bf16", "v_prediction", zero_snr, "0" * 64, "fp32")
    assert (own.weights, plain.weights) == (weights, Weights(Path("/x")))
    assert (own.title, own.description, own.licence) == ("Own", "It is.", "None.")
    assert (own.price_micros, own.sample) == (250_000, {"prompt": "a house"})
    assert (plain.title, plain.price_micros, plain.knobs) == ("plain", STANDARD_PRICE, KNOBS)


def test_a_model_of_before_there_was_more_to_say(db: Database) -> None:
    with db.write() as c:
        c.exec_driver_sql(
            "INSERT INTO models (slug, title, checkpoint, price_micros, added_at) "
            "VALUES ('old', 'Old', '/x', 20000, 0)"
        )
        old = catalogue.catalogue(c)["old"]
    assert (old.title, old.weights, old.price_micros) == ("Old", Weights(Path("/x")), 20_000)


def test_demand_and_where_checkpoints_lie(db: Database) -> None:
    key_id = make_key(db)
    for n, model in enumerate(("a", "b", "a")):
        put(db, key_id, model=model, now=float(n))
    with db.write() as c:
        queue.register(c, "w", 1, "h", 5.0)
        queue.register(c, "x", 1, "h", 5.0)
        queue.register(c, "old", 1, "h", 1.0)
        queue.beat(c, "w", 6.0, 6.0, None, {}, {"a": "STARTING", "b": "UNAVAILABLE"})
        queue.beat(c, "x", 6.0, 6.0, None, {}, {"a": "READY", "b": "UNLOADED", "c": "BUSY"})
        queue.beat(c, "old", 2.0, 2.0, None, {}, {"d": "BUSY"})
    with db.read() as c:
        waiting = model_demand.fairest(c, ["b", "a", "none"], 7.0)
        assert [(w.model, w.since) for w in waiting] == [("a", 0.0), ("b", 1.0)]
        assert model_demand.states(c, 3.0) == {"a": "READY", "b": "UNAVAILABLE", "c": "BUSY"}
        assert model_demand.states(c, 3.0, "x") == {"a": "STARTING", "b": "UNAVAILABLE"}


def test_weights_that_end_their_workers(db: Database) -> None:
    """Those alive, those long ago and those of other weights do not count."""
    bad, good = Weights(Path("/bad")), Weights(Path("/good"))

    def crashing(now: float) -> set[str]:
        with db.read() as c:
            return load_failures.crashing(c, now)

    with db.write() as c:
        for n, weights in enumerate((bad, good, bad, bad)):
            queue.register(c, f"w{n}", 1, "h", 1.0)
            load_failures.begin(c, f"w{n}", weights, 1.0)
    assert crashing(2.0) == set()
    for n in range(4):
        assert crashing(2.0) == set()
        with db.write() as c:
            queue.release(c, f"w{n}", 2.0, KEEP_S, blame=True)
    assert crashing(2.0) == {str(bad)}
    assert crashing(2.0 + load_failures.FORGET_S) == set()
    with db.write() as c:
        load_failures.end(c, "w2")
    assert crashing(2.0) == set()
    with db.write() as c:
        load_failures.begin(c, "w4", bad, 3.0)
    assert crashing(4.0) == {str(bad)}
    with db.write() as c:
        queue.release(c, "w4", 4.0, KEEP_S, blame=False)  # an orderly stop in its midst
    assert crashing(4.0) == set()
    with db.write() as c:
        load_failures.begin(c, "w5", bad, 3.0)
        load_failures.forget(c)
    assert crashing(4.0) == set()


def test_writer_commits_together_and_fails_apart(db: Database) -> None:
    key_id = make_key(db, credits_micros=10**6)
    writer = Writer(db)

    def good(c: sa.Connection) -> None:
        ledger.grant(c, key_id, 1, 1.0)

    def bad(c: sa.Connection) -> None:
        ledger.grant(c, key_id, 1000, 1.0)
        raise ValueError("mine alone")

    futures = [writer.submit(bad if n % 10 == 3 else good) for n in range(100)]
    failures = [f.exception(10) for f in futures]
    writer.close()
    assert sum(f is not None for f in failures) == 10
    assert free(db, key_id) == 10**6 + 90
    assert audit(db) == []


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
            queue.release(c, name, self.tick(), 20.0, blame=blame)

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
            queue.expire(c, self.now)

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
        return cast(Database, store(tmp_path / f"{new_job_id()}.db"))

    AnyOrder.make = staticmethod(make)
    machine, count = AnyOrder.TestCase, hypothesis_settings(max_examples=examples)
    machine.settings = hypothesis_settings(count, stateful_step_count=40, deadline=None)
    machine("runTest").runTest()


def test_wait_for_a_change_returns_when_another_writes(db: Database) -> None:
    from imaged.store.sql.database import Watch

    watch = Watch(db)
    watch.changed()
    assert not watch.changed()
    timer = threading.Timer(0.2, lambda: make_key(db))
    timer.start()
    start = time.monotonic()
    watch.wait(timeout_s=20.0)
    assert time.monotonic() - start < 15
    assert watch.changed()
    timer.join()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there are no hints")
def test_a_hint_of_a_write_is_followed(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here nobody looks without one, and nobody looks often when there was none."""
    from imaged.store.sql import database as module
    from imaged.store.sql.database import SOON_S, Watch

    monkeypatch.setattr(module, "SELDOM_S", 60.0)
    watch = Watch(db)
    watch.changed()
    watch.wait(timeout_s=0.1)
    assert watch.pause_s > 100 * SOON_S and not watch.changed()
    timer = threading.Timer(0.2, lambda: make_key(db))
    timer.start()
    start = time.monotonic()
    watch.wait(timeout_s=30.0)
    assert time.monotonic() - start < 15  # without hints: 30
    assert watch.changed()
    timer.join()
    looks, version = [], watch._version
    watch._version = lambda: looks.append(1) or version()  # type: ignore[method-assign,func-returns-value]
    watch.wait(timeout_s=0.3)  # the hint of a write that was seen already
    assert 3 < len(looks) < 100  # it is followed for a while, and taken


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there are no hints")
def test_there_are_hints_behind_a_link(db: Database, tmp_path: Path) -> None:
    """SQLite keeps its log beside the file itself."""
    from imaged.store.sql.database import Watch

    link = tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(str(db.engine.url.database))
    other = Database(f"sqlite:///{link}")
    assert Watch(other).hint is not None
    other.close()


def test_hints_end_with_their_watch(db: Database) -> None:
    from imaged.store.sql.database import Watch

    watch = Watch(db)
    descriptor = watch.hint
    del watch
    gc.collect()
    if descriptor is not None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


# -- what a full disk, a giving-up caller, a poison job and a hang may not do --------------------


def test_a_full_disk_in_a_group_commit_loses_nothing_that_was_promised(db: Database) -> None:
    """SQLite undoes the whole transaction when a statement in its middle finds the disk full."""
    key_id = make_key(db, credits_micros=10**9)
    db.close()

    def narrow(raw: Any, _: Any) -> None:
        raw.execute("PRAGMA max_page_count=200").close()  # 800 KB: full
        raw.execute("PRAGMA cache_size=10").close()  # so that pages are written in mid-transaction

    def submit(job_id: str) -> Callable[[sa.Connection], object]:
        values: dict[str, Any] = {"key_id": key_id, "model": "m", "cost_micros": 1, "now": 1.0}
        params = ImageParams("x" * 20_000)
        return lambda c: queue.put(c, job_id=job_id, params=params, **values)

    sa.event.listen(db.engine, "connect", narrow)
    writer, gate = Writer(db), threading.Event()
    writer.submit(lambda _: gate.wait(20))  # all others gather behind it
    asked = {job_id: writer.submit(submit(job_id)) for job_id in (new_job_id() for _ in range(60))}
    gate.set()
    writer.close()
    promised = {job_id for job_id, future in asked.items() if future.exception() is None}
    with db.read() as c:
        kept = set(queue.read(c, list(asked)))
    assert len(promised) < len(asked)  # it did become full
    assert kept == promised
    assert audit(db) == []


def test_a_caller_that_gives_up_does_not_stop_the_writer(db: Database) -> None:
    writer, gate = Writer(db), threading.Event()
    writer.submit(lambda _: gate.wait(20))
    ran: list[int] = []
    given_up = writer.submit(lambda _: ran.append(1))
    assert given_up.cancel()
    gate.set()
    assert writer.submit(lambda _: 5).result(20) == 5
    assert ran == []
    writer.close()


def test_a_job_that_saw_a_worker_die_runs_by_itself(db: Database) -> None:
    key_id = make_key(db)
    first, second, third = (put(db, key_id) for _ in range(3))
    worker(db)
    assert [j.id for j in claim(db, limit=2)] == [first, second]
    with db.write() as c:
        queue.release(c, "w", 3.0, KEEP_S, blame=True)
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
        queue.release(c, "w", 4010.0, KEEP_S, blame=False)
        limits = {"lease_s": 10.0, "queue_s": 3600.0, "run_s": 1800.0, "retention_s": KEEP_S}
        queue.reap(c, 4020.0, **limits)
    assert get(db, job_id).state is State.QUEUED
    with db.write() as c:
        queue.reap(c, 7700.0, **limits)
    assert get(db, job_id).reason == "queue_timeout"


def test_a_hang_is_seen_with_and_without_a_job(db: Database, tmp_path: Path) -> None:
    supervisor = Supervisor(Settings(data=tmp_path, hang_s=300.0), db)
    slot = _Slot(cast(Any, None), "w", started=time.monotonic())
    now = time.time()
    worker(db, now=now)

    def beat(ticked_ago: float, checkpoint: str | None) -> bool:
        with db.write() as c:
            queue.beat(c, "w", now, now - ticked_ago, checkpoint, {})
        return supervisor._hangs(slot)

    assert not beat(ticked_ago=1000.0, checkpoint=None)  # loads its first checkpoint
    assert not beat(ticked_ago=1.0, checkpoint="micro")
    assert beat(ticked_ago=1000.0, checkpoint="micro")  # its only job was cancelled, it hangs on


@pytest.mark.parametrize("begun", [True, False])
def test_a_job_that_gives_way_has_not_waited_in_vain(db: Database, begun: bool) -> None:
    """Neither by its own deadline nor by the server's; one that never began still may."""
    key_id = make_key(db)
    job_id = put(db, key_id, options=RequestOptions(cancel_after_s=30.0))
    with db.write() as c:
        queue.register(c, "w", 1, "here", 5.0)
        [job] = queue.claim(c, "w", ["m"], 1, 5.0)
        queue.give_back(c, job, "w", 200.0, 60.0, begun=begun)
        queue.reap(c, 201.0, lease_s=1e6, queue_s=60.0, run_s=1e6, retention_s=60.0)
        assert queue.read(c, [job_id])[job_id].state is (State.QUEUED if begun else State.FAILED)
