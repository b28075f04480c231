"""Keys and their money on a real database: nobody overspends, every end is paid for once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from imaged.errors import NoCredits, TooFast
from imaged.jobs import State, new_job_id
from imaged.store.accounts import keys, ledger
from imaged.store.jobs import queue
from imaged.store.sql.database import Database
from imaged.store.sql.schema import api_keys
from tests.in_store import KEEP_S, RESULT, SECRET, audit, claim, free, get, make_key, put, worker


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
        ledger.settle(c, key_id, job_id, 10, 2.0, reserved_micros=10)
    for again in (partial(ledger.settle, reserved_micros=10), ledger.release):
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


# -- what is kept -----------------------------------------------------------------------------


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


def test_expiry_forgets_jobs_but_not_money(db: Database) -> None:
    key_id = make_key(db)
    job_id = put(db, key_id)
    worker(db)
    [job] = claim(db)
    with db.write() as c:
        queue.finish(c, job, "w", RESULT, 10.0, 100.0)
        assert queue.delete_expired(c, 109.0) == []
        assert [gone.id for gone in queue.delete_expired(c, 111.0)] == [job_id]
        assert queue.read(c, [job_id]) == {}
    assert audit(db) == []
