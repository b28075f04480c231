"""Idempotency-Key and Cancel-After on a real store, each with its mutant."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from starlette.datastructures import Headers

from imaged.errors import BadParameter, IdempotencyMismatch
from imaged.gateway.submit.submission import Asked, fingerprint, read_submission
from imaged.jobs import State, Submission
from imaged.params.image_params import ImageParams
from imaged.store.accounts import keys, ledger
from imaged.store.jobs import idempotency, queue
from imaged.store.sql.database import Database
from imaged.store.sql.group_commit import Writer
from imaged.store.sql.schema import jobs
from tests.in_store import KEEP_S, RESULT, asking, audit, claim, free, get, make_key, worker
from tests.mutants import red

UNDER_A: Mapping[str, Any] = {"idempotency_key": "a", "fingerprint": "x"}
LIMITS = {"lease_s": 1e6, "queue_s": 1e6, "run_s": 1e6, "retention_s": KEEP_S}


def order(c: sa.Connection, key_id: int, now: float = 1.0, **more: Any) -> str:
    return queue.put(c, asking(key_id, **more), now).job_id


def ordered(db: Database, key_id: int, now: float = 1.0, **more: Any) -> str:
    with db.write() as c:
        return order(c, key_id, now, **more)


# -- Idempotency-Key ----------------------------------------------------------------------------


def test_a_repeat_is_the_first_job_and_costs_nothing(db: Database) -> None:
    key_id = make_key(db, rpm=1)  # one token: a repeat takes none
    first = ordered(db, key_id, **UNDER_A)
    assert [ordered(db, key_id, **UNDER_A) for _ in range(3)] == [first] * 3
    assert free(db, key_id) == 990
    worker(db)
    [job] = claim(db)
    with db.write() as c:
        queue.finish(c, job, "w", RESULT, 3.0, KEEP_S)
    assert ordered(db, key_id, **UNDER_A) == first  # also when it has ended
    assert free(db, key_id) == 990 and audit(db) == []


def test_an_idempotency_key_is_its_api_keys_own(db: Database) -> None:
    mine, other = make_key(db), make_key(db)
    assert ordered(db, mine, **UNDER_A) != ordered(db, other, **UNDER_A)
    assert ordered(db, mine) != ordered(db, mine)


def test_another_request_under_the_same_key_is_refused(db: Database) -> None:
    key_id = make_key(db)
    ordered(db, key_id, **UNDER_A)
    with pytest.raises(IdempotencyMismatch) as caught:
        ordered(db, key_id, idempotency_key="a", fingerprint="y")
    assert caught.value.status == 409
    assert free(db, key_id) == 990


def test_it_is_remembered_as_long_as_the_record_lives(db: Database) -> None:
    key_id = make_key(db)
    first = ordered(db, key_id, **UNDER_A)
    with db.write() as c:
        queue.cancel(c, first, 5.0, retention_s=10.0)
    assert ordered(db, key_id, **UNDER_A, now=14.9) == first
    second = ordered(db, key_id, **UNDER_A, now=15.0)  # expired, its row still there
    assert second != first and ordered(db, key_id, **UNDER_A, now=15.0) == second
    with db.write() as c:
        assert [job.id for job in queue.delete_expired(c, 16.0)] == [first]
    assert ordered(db, key_id, **UNDER_A, now=16.0) == second


def race(db: Database) -> tuple[int, int]:
    """Two gateways, 16 requests at once under one key: jobs made, and money held."""
    key_id = make_key(db)
    writers = [Writer(db), Writer(db)]
    with ThreadPoolExecutor(16) as pool:
        futures = pool.map(
            lambda n: writers[n % 2].submit(lambda c: order(c, key_id, **UNDER_A)), range(16)
        )
        made = {future.result(30) for future in futures if future.exception(30) is None}
    for writer in writers:
        writer.close()
    return len(made), 1000 - free(db, key_id)


def test_requests_at_the_same_instant_make_one_job(db: Database) -> None:
    assert race(db) == (1, 10)
    assert audit(db) == []


def test_mutant_without_the_lookup_is_stopped_by_the_index(db: Database) -> None:
    key_id = make_key(db)
    ordered(db, key_id, **UNDER_A)
    with red(idempotency, "find", lambda *_: None, raises=sa.exc.IntegrityError):
        ordered(db, key_id, **UNDER_A)
    assert free(db, key_id) == 990


def test_mutant_without_lookup_and_index_charges_twice(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "find", lambda *_: None)
    with db.write() as c:
        c.exec_driver_sql("DROP INDEX one_job_an_idempotency_key")
    assert race(db) == (16, 160)


def test_the_fingerprint_tells_requests_apart_and_not_the_prompt() -> None:
    params = ImageParams("a red house")
    same = fingerprint(b"s", asking(1, params=ImageParams("a red house")))
    assert fingerprint(b"s", asking(1, params=params)) == same
    others = [
        fingerprint(b"s", asking(1, model="other", params=params)),
        fingerprint(b"s", asking(1, params=ImageParams("a red house", seed=1))),
        fingerprint(b"s", asking(1, params=params, draft_steps=8)),
        fingerprint(b"s", asking(1, params=params, made_in="cpu float32")),
        fingerprint(b"other", asking(1, params=params)),
    ]
    assert len({same, *others}) == 6


# -- Cancel-After -------------------------------------------------------------------------------


def test_a_job_that_waits_past_its_own_deadline_ends_and_is_not_claimed(db: Database) -> None:
    key_id = make_key(db)
    patient, hasty = (ordered(db, key_id, cancel_after_s=s, now=100.0) for s in (None, 5.0))
    worker(db, now=100.0)
    with db.write() as c:
        queue.reap(c, 105.0, **LIMITS)
    assert get(db, hasty).state is State.QUEUED
    assert [job.id for job in claim(db, now=105.5)] == [patient]  # before anybody reaped
    with db.write() as c:
        assert queue.reap(c, 105.5, **LIMITS) == 1
    job = get(db, hasty)
    assert (job.state, job.reason) == (State.FAILED, "queue_timeout")
    assert "Cancel-After" in (job.error or "")
    assert free(db, key_id) == 990 and audit(db) == []


def test_a_job_that_runs_is_not_ended_by_its_queue_deadline(db: Database) -> None:
    job_id = ordered(db, make_key(db), cancel_after_s=5.0, now=100.0)
    worker(db, now=100.0)
    assert len(claim(db, now=104.0)) == 1
    with db.write() as c:
        assert queue.reap(c, 200.0, **LIMITS) == 0
    assert get(db, job_id).state is State.PROCESSING


# -- the headers --------------------------------------------------------------------------------


def read(headers: Headers) -> Submission:
    return read_submission(b"s", 1, headers, Asked(asking(1).model, {"prompt": "x"}))


@pytest.mark.parametrize("value", ["a", "x" * 255, '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "!~"])
def test_idempotency_keys_that_are_taken(value: str) -> None:
    assert read(Headers({"Idempotency-Key": value})).idempotency_key == value


@pytest.mark.parametrize("values", [[""], ["x" * 256], ["a b"], ["\xe9"], ["\x7f"], ["a", "a"]])
def test_idempotency_keys_that_are_refused(values: list[str]) -> None:
    raw = [(b"idempotency-key", value.encode("latin-1")) for value in values]
    with pytest.raises(BadParameter, match=r"^Idempotency-Key should be"):
        read(Headers(raw=raw))


@pytest.mark.parametrize(("value", "seconds"), [("1", 1.0), ("0.5", 0.5), ("86400", 86400.0)])
def test_deadlines_that_are_taken(value: str, seconds: float) -> None:
    assert read(Headers({"cancel-after": value})).cancel_after_s == seconds


@pytest.mark.parametrize(
    "value", ["", "0", "0.0", "-1", "86401", "1e3", "nan", "inf", "soon", "1 ", "٣", "9" * 400]
)
def test_deadlines_that_are_refused(value: str) -> None:
    raw = [(b"cancel-after", value.encode("utf-8"))]
    with pytest.raises(BadParameter, match=r"^Cancel-After should be"):
        read(Headers(raw=raw))


def test_keys_and_ledger_agree_after_all(db: Database) -> None:
    """The clock of the store is the caller's: a repeat long after makes no difference."""
    key_id = make_key(db)
    first = ordered(db, key_id, **UNDER_A, now=time.time())
    assert ordered(db, key_id, **UNDER_A, now=time.time() + 1e6) == first
    with db.read() as c:
        assert [row.reserved_micros for row in keys.rows(c)] == [10]
        assert ledger.free(c, key_id) == 990
        assert c.execute(sa.select(sa.func.count()).select_from(jobs)).scalar_one() == 1


def test_a_request_keeps_its_fingerprint_when_there_are_new_fields() -> None:
    """As it was kept before there was any of them: a repeat across an upgrade is a repeat."""
    first: dict[str, Any] = {
        "prompt": "a red house",
        "negative_prompt": None,
        "samples": 1,
        "seed": 7,
        "scheduler": "Euler",
        "num_inference_steps": 25,
        "guidance_scale": 7.0,
        "img_width": 1024,
        "img_height": 1024,
        "base64": False,
        "output_format": "jpeg",
    }
    text = json.dumps(["m", first], sort_keys=True)
    kept = hmac.new(b"s", b"fingerprint:" + text.encode(), hashlib.sha256).hexdigest()
    assert fingerprint(b"s", asking(1, params=ImageParams(**first))) == kept
    assert fingerprint(b"s", asking(1, params=ImageParams(**first, clip_skip=1))) != kept
