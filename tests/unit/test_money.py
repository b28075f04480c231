"""Money, repeats and messages under any order of events; two mutants show that it can see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from hypothesis import Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from imaged.errors import IdempotencyMismatch, NoCredits
from imaged.jobs import OPEN, Job, State
from imaged.params.image_params import ImageParams
from imaged.store.accounts import ledger
from imaged.store.jobs import drafts, idempotency, queue
from imaged.store.sql.database import Database
from imaged.store.sql.schema import jobs
from imaged.store.webhooks import outbox, subscriptions
from tests.conftest import store
from tests.in_store import RESULT, asking, audit, make_key
from tests.mutants import red

GRANTED, KEEP_S = 300, 20.0
KEYS = st.sampled_from([None, "a", "b"])


class AnyOrder(RuleBasedStateMachine):
    """One API key with a webhook; submits, repeats, refusals, workers, cancels and time."""

    make: Callable[[], Database]

    def __init__(self) -> None:
        super().__init__()
        self.db = type(self).make()
        self.now = 1.0
        self.key = make_key(self.db, credits_micros=GRANTED)
        self.held: list[tuple[str, Job]] = []
        self.known: list[str] = []
        self.under: dict[str, tuple[str, str]] = {}  # Idempotency-Key -> (job, fingerprint)
        with self.db.write() as c:
            subscriptions.add(c, self.key, "http://x/", [subscriptions.ANY_END], 1.0)

    def tick(self) -> float:
        self.now += 1
        return self.now

    @rule(
        key=KEYS,
        fingerprint=st.sampled_from("xxy"),
        wait_s=st.sampled_from([None, 5.0]),
        cost=st.sampled_from([20, 70]),
        refused=st.booleans(),
        draft=st.sampled_from([0, 0, 8]),
    )
    def submit(
        self,
        key: str | None,
        fingerprint: str,
        wait_s: float | None,
        cost: int,
        refused: bool,
        draft: int,
    ) -> None:
        """What the gateway does in its one transaction."""
        now = self.tick()
        asked = asking(
            self.key,
            cost,
            params=ImageParams("x", samples=2),
            idempotency_key=key,
            fingerprint=fingerprint,
            cancel_after_s=wait_s,
            draft_steps=draft,
        )
        first = self._remembered(key, now)
        try:
            with self.db.write() as c:
                placed = queue.put(c, asked, now)
                if refused and not placed.repeated:
                    queue.refuse(c, placed.job_id, "content_policy", "text", now, KEEP_S)
        except NoCredits:
            assert first is None
            return
        except IdempotencyMismatch:
            assert first is not None and first[1] != fingerprint
            return
        assert first is None or first == (placed.job_id, fingerprint)
        assert placed.repeated == (first is not None)
        if key is not None:
            self.under[key] = (placed.job_id, fingerprint)
        self.known.append(placed.job_id)

    def _remembered(self, key: str | None, now: float) -> tuple[str, str] | None:
        """The first job under a key whose record still lives."""
        first = self.under.get(key or "")
        with self.db.read() as c:
            job = queue.read(c, [first[0]]).get(first[0]) if first else None
        alive = job is not None and (job.expires_at is None or job.expires_at > now)
        return first if alive else None

    @rule(name=st.sampled_from(["a", "b"]))
    def work(self, name: str) -> None:
        with self.db.write() as c:
            if queue.beat(c, name, self.now, self.now, "micro", {}) is None:
                queue.register(c, name, 1, "host", self.now)
            self.held += [(name, job) for job in queue.claim(c, name, ["m"], 2, self.tick())]

    @rule(n=st.integers(0, 9), fails=st.booleans())
    def report(self, n: int, fails: bool) -> None:
        """Any report that was ever due, also late and repeated ones."""
        if self.held:
            name, job = self.held[n % len(self.held)]
            with self.db.write() as c:
                if fails:
                    queue.fail(c, job, name, "engine_error", "x", self.tick(), KEEP_S)
                elif job.draft and not job.draft.samples:
                    drafts.park(c, job, name, RESULT, job.unet_calls, self.tick(), KEEP_S)
                else:
                    queue.finish(c, job, name, RESULT, self.tick(), KEEP_S)

    @rule(n=st.integers(0, 9), samples=st.sampled_from([[0], [1], [0, 1]]))
    def choose(self, n: int, samples: list[int]) -> None:
        """Also of jobs that are parked no more."""
        with self.db.write() as c:
            found = queue.read(c, self.known[n % 10 : n % 10 + 1])
            for job in found.values():
                if job.state is State.PARKED:
                    assert drafts.resume(c, job, samples, job.params, self.tick())
                assert job.draft is None or not drafts.resume(c, job, samples, job.params, self.now)

    @rule(n=st.integers(0, 9))
    def cancel(self, n: int) -> None:
        if self.known:
            with self.db.write() as c:
                queue.cancel(c, self.known[n % len(self.known)], self.tick(), KEEP_S)

    @rule(name=st.sampled_from(["a", "b"]), blame=st.booleans())
    def die(self, name: str, blame: bool) -> None:
        with self.db.write() as c:
            queue.end_lease(c, name, self.tick(), KEEP_S, blame=blame)

    @rule(leap=st.sampled_from([1.0, 12.0, 60.0]))
    def time_passes(self, leap: float) -> None:
        self.now += leap
        with self.db.write() as c:
            queue.reap(c, self.now, lease_s=10, queue_s=50, run_s=30, retention_s=KEEP_S)
            queue.delete_expired(c, self.now)

    @invariant()
    def money_adds_up(self) -> None:
        """Counted from the rows by hand, not by the ledger's own functions."""
        with self.db.read() as c:
            sums: dict[str, int] = dict(
                c.execute(sa.text("SELECT kind, SUM(amount_micros) FROM ledger GROUP BY kind"))
                .tuples()
                .all()
            )
            balance, reserved = c.execute(
                sa.text("SELECT balance_micros, reserved_micros FROM api_keys")
            ).one()
            still_open = c.execute(
                sa.select(sa.func.coalesce(sa.func.sum(jobs.c.cost_micros), 0)).where(
                    jobs.c.state.in_(OPEN)
                )
            ).scalar_one()
        assert balance == GRANTED - sums.get("settle", 0)
        assert reserved == still_open
        assert 0 <= reserved <= balance
        assert audit(self.db) == []

    @invariant()
    def every_end_is_one(self) -> None:
        """A job that has ended has one end in the ledger, the right one, and one message."""
        with self.db.read() as c:
            ends = c.execute(
                sa.text("SELECT job_id, kind FROM ledger WHERE kind IN ('settle', 'release')")
            ).all()
            told = c.execute(sa.text("SELECT job_id, type FROM outbox")).all()
            found = {job.id: job for job in queue.newest(c, 1000)}
        assert len({row.job_id for row in ends}) == len(ends)
        assert sorted(r.job_id for r in ends) == sorted(r.job_id for r in told)
        ended = {row.job_id: row.kind for row in ends}
        types = {row.job_id: row.type for row in told}
        for job_id, job in found.items():
            assert job.state.final == (job_id in ended)
            if job.state.final:
                done, shown = job.state is State.COMPLETED, bool(job.draft and job.draft.calls)
                left = job.state is State.CANCELLED and shown  # looked at, and not wanted
                assert (ended[job_id] == "settle") == (done or left)
                assert types[job_id] == (subscriptions.COMPLETED if done else subscriptions.FAILED)

    def teardown(self) -> None:
        self.db.close()


def test_what_was_used_is_summed_from_an_index(db: Database) -> None:
    """Reading every movement of all keys would hold up whoever asks often."""
    key_id, statements = make_key(db), list[str]()
    sa.event.listen(db.engine, "before_cursor_execute", lambda *a: statements.append(a[2]))
    with db.read() as c:
        assert ledger.used(c, key_id) == 0
        plan = c.exec_driver_sql(f"EXPLAIN QUERY PLAN {statements[-1]}", (0, key_id)).all()
    assert "USING COVERING INDEX charges_by_key" in str(plan)


def run(tmp_path: Path, prepare: Callable[[Database], None], **given: Any) -> None:
    def make() -> Database:
        database: Database = store(tmp_path / f"{uuid4().hex}.db")
        prepare(database)
        return database

    AnyOrder.make = staticmethod(make)
    machine = AnyOrder.TestCase
    machine.settings = hypothesis_settings(stateful_step_count=40, deadline=None, **given)
    machine("runTest").runTest()


@pytest.mark.parametrize("examples", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_any_order_of_events(tmp_path: Path, examples: int) -> None:
    run(tmp_path, lambda _: None, max_examples=examples)


@pytest.mark.slow
def test_mutants_without_lookup_or_message_are_seen(tmp_path: Path) -> None:
    def without_index(db: Database) -> None:
        with db.write() as c:
            c.exec_driver_sql("DROP INDEX one_job_an_idempotency_key")

    given: dict[str, Any] = {"max_examples": 20, "phases": [Phase.generate]}
    with red(idempotency, "find", lambda *_: None):
        run(tmp_path, without_index, **given)
    with red(outbox, "announce", lambda *_: None):
        run(tmp_path, lambda _: None, **given)
