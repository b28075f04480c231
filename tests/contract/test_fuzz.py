"""Bodies that nobody should send, by the thousand, through the whole app in process."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from starlette.types import ASGIApp

from imaged import jobs
from imaged.gateway.app import build_app
from imaged.gateway.context import Gateway
from imaged.jobs import State, price_micros
from imaged.params import knobs
from imaged.store import catalogue
from imaged.store.accounts import ledger
from imaged.store.jobs import queue
from imaged.store.sql.schema import api_keys
from imaged.store.webhooks import subscriptions
from tests.contract.gate import Gate
from tests.contract.mutator import GOOD, Sent, mutants
from tests.contract.test_hostile import alive
from tests.mutants import red

BODIES = int(os.environ.get("FUZZ_BODIES", "12000"))  # of the slow tier
AT_ONCE = 64


@dataclass(frozen=True)
class Answer:
    """`job_id` is of the job that was made, or had been made before, for the request."""

    path: str
    status: int
    job_id: str | None
    wrong: str  # what is, if anything


async def ask(app: ASGIApp, key: str, sent: Sent) -> Answer:
    """One request as uvicorn hands it to the app."""
    given = {"host": "x", "x-api-key": key, "authorization": f"Bearer {key}", **sent.headers}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": sent.path,
        "raw_path": sent.path.encode(),
        "root_path": "",
        "query_string": b"",
        "server": ("x", 80),
        "client": ("127.0.0.1", 1),
        "state": {},
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in given.items()],
    }
    told: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": sent.content, "more_body": False}

    async def send(message: Any) -> None:
        told.append(message)

    with suppress(Exception):  # Starlette raises again what it has answered with 500
        await app(scope, receive, send)
    start, *bodies = told
    content = b"".join(message["body"] for message in bodies)
    found = dict(start["headers"]).get(b"x-request-id")
    fine = judged(start["status"], found is not None, content)
    wrong = "" if fine else f"{start['status']} {content[:80]!r} for {sent}"
    return Answer(sent.path, start["status"], found.decode() if found else None, wrong)


def judged(status: int, has_job: bool, content: bytes) -> bool:
    """Whether it is no fault of the server's, and a refusal says why. A 504 with a job is what
    the original says too when the job takes longer than it waits.
    """
    allowed = status < 500 or (status == 504 and has_job)
    return allowed and (status == 200 or bool(json.loads(content)["error"]))


async def through(app: ASGIApp, key: str, requests: Iterable[Sent]) -> list[Answer]:
    """The answers, of so many at a time as a server has in hand."""
    answers, left = [], iter(requests)
    async with alive(app):
        while some := list(islice(left, AT_ONCE)):
            answers += await asyncio.gather(*(ask(app, key, sent) for sent in some))
    return answers


def fuzz(folder: Path, count: int, seed: int = 1) -> tuple[list[Answer], list[str]]:
    """What so many mutants were answered, and what is wrong with that or in the store."""
    (folder / "data").mkdir()
    idle = Gate(folder / "data", wait_s=0.0)
    key = idle.make_key(credits=1e9, rpm=100_000_000, name="fuzzed")
    answers = asyncio.run(
        through(build_app(Gateway.open(idle.settings)), key, mutants(count, seed))
    )
    wrong = [*filter(None, (a.wrong for a in answers)), *differences(idle, answers)]
    idle.database.close()
    return answers, wrong


def differences(idle: Gate, answers: list[Answer]) -> Iterator[str]:
    """Between what was answered and the store: jobs that nobody was told of, or that are not
    there, and money that is not theirs.
    """
    with idle.database.read() as c:
        jobs = {job.id: job for job in queue.newest(c, len(answers))}
        offered, books = catalogue.catalogue(c), ledger.audit(c)
        row = c.execute(sa.select(api_keys).where(api_keys.c.name == "fuzzed")).one()
        hooks = len(subscriptions.of_key(c, row.id))
    yield from books
    told = {answer.job_id for answer in answers if answer.job_id}
    yield from (f"{job_id} is told of or there, not both" for job_id in told ^ set(jobs))
    held = 0
    for job in jobs.values():
        price = price_micros(offered[job.model], job.params)
        held += price if job.state is State.QUEUED else 0
        if job.cost_micros != price or job.state not in (State.QUEUED, State.FAILED):
            yield f"{job.id}: {job.cost_micros} of {price}, {job.state}"
    if (row.reserved_micros, row.balance_micros) != (held, 10**15):
        yield f"the key holds {row.reserved_micros} of {row.balance_micros}, its jobs cost {held}"
    added = sum(a.path == "/webhook/add" and a.status == 200 for a in answers)
    if added != hooks:
        yield f"{added} webhooks were added and {hooks} are there"


@pytest.mark.parametrize("count", [2000, pytest.param(BODIES, marks=pytest.mark.slow)])
def test_thousands_of_mutants_go_through_the_whole_app(tmp_path: Path, count: int) -> None:
    """From the guards to the store, under a key that can pay; nobody works, so no job ends.

    All hundred thousand, in two or three minutes:
    FUZZ_BODIES=100000 python -m pytest tests/contract/test_fuzz.py -k mutants_go_through
    """
    answers, wrong = fuzz(tmp_path, count)
    assert wrong == []
    assert len(answers) == count
    for path in GOOD:  # each hears every kind of answer
        seen = Counter(a.status for a in answers if a.path == path)
        taken = seen[200] + seen[504] + seen[404]  # of no webhook of this id
        assert seen[400] > count / 50 and taken > count / 2000, (path, seen)


def test_mutant_that_reads_carelessly(tmp_path: Path) -> None:
    """Were numbers read as Python reads them, a few hundred bodies would show it."""
    with red(knobs._READERS, "integer", lambda _, value: int(value)):
        assert not any(line.startswith("500") for line in fuzz(tmp_path, 500)[1])


def test_mutant_that_charges_too_much(tmp_path: Path) -> None:
    with red(jobs, "price_micros", lambda *given: price_micros(*given) + 1):
        assert not any("of" in line for line in fuzz(tmp_path, 500)[1])
