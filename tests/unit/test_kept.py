"""Answers to polls that are given again, and writes that are sent as one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from imaged.gateway import status
from imaged.gateway.edge import SMALL, Corked
from imaged.gateway.status import Answer, Ident, Kept
from imaged.store import keys
from imaged.store.db import Database, Watch

IDENT: Ident = ("/v2/requests/x/status", b"", b"key", b"here", "http")
ANSWER: Answer = ({"status": 200}, {"body": b"{}"})
LATER = 4e9


def write(db: Database) -> None:
    with db.write() as connection:
        keys.create(connection, b"secret", time.time(), name="", credits_micros=0)


def in_turns(*steps: Callable[[], Any]) -> list[Any]:
    """What each step says, each in a turn of the loop of its own."""

    async def run() -> list[Any]:
        said = []
        for step in steps:
            said.append(step())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return said

    return asyncio.run(run())


def test_an_answer_holds_until_somebody_writes(db: Database) -> None:
    kept = Kept(Watch(db))

    def get() -> Answer | None:
        return kept.get(IDENT)

    def put() -> None:
        kept.put(IDENT, kept.writes, LATER, ANSWER)

    assert in_turns(get, put, get, get) == [None, None, ANSWER, ANSWER]
    assert in_turns(get, lambda: write(db), get, get) == [ANSWER, None, None, None]


def test_what_was_read_before_a_write_is_not_kept(db: Database) -> None:
    """It was read, another poll heard of a write, and then it would have been kept."""
    kept = Kept(Watch(db))
    writes: list[int] = []

    def put() -> None:
        kept.put(IDENT, writes[0], LATER, ANSWER)

    def look() -> Answer | None:
        return kept.get(IDENT)

    in_turns(look, lambda: writes.append(kept.writes), lambda: write(db), look)
    assert in_turns(put, look) == [None, None]


def test_an_answer_ends_with_its_job(db: Database) -> None:
    kept = Kept(Watch(db))
    in_turns(lambda: kept.get(IDENT))
    kept.put(IDENT, kept.writes, time.time() - 1, ANSWER)
    assert in_turns(lambda: kept.get(IDENT)) == [None]


@pytest.mark.parametrize("field", range(5))
def test_whoever_asks_otherwise_is_not_given_it(db: Database, field: int) -> None:
    kept = Kept(Watch(db))
    in_turns(lambda: kept.get(IDENT))
    kept.put(IDENT, kept.writes, LATER, ANSWER)
    other: Any = [*IDENT]
    other[field] += b"x" if isinstance(other[field], bytes) else "x"
    assert in_turns(lambda: kept.get(IDENT), lambda: kept.get(tuple(other))) == [ANSWER, None]


def test_one_look_serves_a_turn(db: Database) -> None:
    looks: list[bool] = []

    class Counted(Watch):
        def changed(self) -> bool:
            looks.append(super().changed())
            return looks[-1]

    kept = Kept(Counted(db))

    def three() -> None:
        for _ in range(3):
            kept.get(IDENT)

    in_turns(three, three)
    assert looks == [True, False]


def test_a_store_that_cannot_tell_of_writes_has_nothing_kept(db: Database) -> None:
    watch = Watch(db)
    watch.exact = False
    kept = Kept(watch)
    in_turns(lambda: kept.get(IDENT), lambda: kept.put(IDENT, kept.writes, LATER, ANSWER))
    assert in_turns(lambda: kept.get(IDENT)) == [None]


def test_a_store_in_trouble_is_for_whoever_reads_it(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(db)
    kept = Kept(watch)
    in_turns(lambda: kept.get(IDENT), lambda: kept.put(IDENT, kept.writes, LATER, ANSWER))

    def fails() -> bool:
        raise OSError("the disk is gone")

    monkeypatch.setattr(watch, "changed", fails)
    assert in_turns(lambda: kept.get(IDENT)) == [None]


def test_a_long_host_is_not_kept(db: Database) -> None:
    kept = Kept(Watch(db))
    in_turns(lambda: kept.get(IDENT))
    kept.put((*IDENT[:3], b"h" * 256, "http"), kept.writes, LATER, ANSWER)
    assert not kept._answers


def test_memory_has_a_bound(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "MOST_KEPT", 3)
    kept = Kept(Watch(db))
    in_turns(lambda: kept.get(IDENT))
    for n in range(10):
        kept.put((f"/{n}", *IDENT[1:]), kept.writes, LATER, ANSWER)
    assert len(kept._answers) <= 3


class Sent:
    """A transport that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.is_closing = lambda: False
        self.get_write_buffer_size = lambda: 0
        self.write = self.writelines = self.told.append

    def close(self) -> None:
        self.told.append("closed")


def corked(use: Callable[[Any], None]) -> list[Any]:
    """What goes out in the turn in which it was written, a mark, and what goes out after it."""

    async def run() -> list[Any]:
        sent = Sent()
        transport: Any = sent
        use(Corked(transport, asyncio.get_running_loop()))
        sent.told.append("turn")
        await asyncio.sleep(0)
        return sent.told

    return asyncio.run(run())


def test_headers_and_body_are_one_write() -> None:
    assert corked(lambda t: (t.write(b"head "), t.write(b"body"))) == [b"head body", "turn"]


def test_headers_without_a_body_yet_do_not_wait_for_it() -> None:
    assert corked(lambda t: t.write(b"head")) == ["turn", b"head"]


def test_order_is_kept_however_many_writes() -> None:
    told = corked(lambda t: [t.write(b"%d" % n) for n in range(5)])
    assert b"".join(part for part in told if part != "turn") == b"01234"


def test_a_large_body_is_not_copied() -> None:
    body = bytes(SMALL + 1)
    assert corked(lambda t: (t.write(b"head"), t.write(body))) == [[b"head", body], "turn"]


def test_nothing_held_is_lost_by_closing() -> None:
    assert corked(lambda t: (t.write(b"last"), t.close())) == [b"last", "closed", "turn"]


def test_what_nobody_can_read_is_dropped() -> None:
    assert corked(lambda t: (t.write(b"late"), t.drop())) == ["turn"]
