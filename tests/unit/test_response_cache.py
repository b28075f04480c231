"""Answers to polls that are given again, and writes that are sent as one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from imaged.gateway.transport import response_cache as module
from imaged.gateway.transport.protocol import SMALL, CoalescingTransport
from imaged.gateway.transport.response_cache import MAX_REQUEST_BYTES, Ident, ResponseCache
from imaged.store.accounts import keys
from imaged.store.sql.database import Database, Watch

IDENT: Ident = ("127.0.0.1", b"GET /v2/requests/x/status HTTP/1.1\r\nx-api-key: k\r\n\r\n")
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
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
        return [s[0] if isinstance(s, list) else s for s in said]

    return asyncio.run(run())


def asked(cache: ResponseCache, ident: Ident = IDENT) -> list[bytes | None]:
    """What one who asks now has heard when the turn is over; None if there is no answer."""
    heard: list[bytes | None] = []
    if not cache.ask(ident, heard.append):
        heard.append(None)
    return heard


def filled(db: Database) -> ResponseCache:
    """One that has looked at the store and keeps ANSWER."""
    cache = ResponseCache(Watch(db))
    cache.check()
    cache.put(IDENT, cache.writes, LATER, ANSWER)
    return cache


def test_an_answer_holds_until_somebody_writes(db: Database) -> None:
    cache = filled(db)

    def get() -> Any:
        return asked(cache)

    assert in_turns(get, get) == [ANSWER, ANSWER]
    assert in_turns(get, lambda: write(db), get, get) == [ANSWER, None, None, None]


def test_a_write_after_the_question_is_heard_of_before_the_answer(db: Database) -> None:
    cache = filled(db)

    def get_then_write() -> Any:
        heard = asked(cache)
        write(db)
        return heard

    assert in_turns(get_then_write) == [None]


def test_what_was_read_before_a_write_is_not_kept(db: Database) -> None:
    """It was read, another poll heard of a write, and then it would have been kept."""
    cache = filled(db)
    writes = cache.writes
    other: Ident = ("127.0.0.1", b"other")
    write(db)
    assert in_turns(lambda: asked(cache)) == [None]
    cache.put(other, writes, LATER, ANSWER)
    assert in_turns(lambda: asked(cache, other)) == [None]
    cache.put(other, cache.writes, LATER, ANSWER)
    assert in_turns(lambda: asked(cache, other)) == [ANSWER]


def test_an_answer_ends_with_its_job(db: Database) -> None:
    cache = filled(db)
    cache.put(IDENT, cache.writes, time.time() - 1, ANSWER)
    assert in_turns(lambda: asked(cache)) == [None]


@pytest.mark.parametrize("other", [("127.0.0.2", IDENT[1]), (IDENT[0], IDENT[1] + b"\n")])
def test_whoever_asks_otherwise_is_not_given_it(db: Database, other: Ident) -> None:
    cache = filled(db)
    assert in_turns(lambda: asked(cache), lambda: asked(cache, other)) == [ANSWER, None]


def test_one_look_serves_a_turn(db: Database) -> None:
    cache, looks = filled(db), list[Any]()
    right = cache.watch.changed

    def noted() -> Any:
        looks.append(right())
        return looks[-1]

    cache.watch.changed = noted  # type: ignore[method-assign]

    def three() -> None:
        for _ in range(3):
            asked(cache)

    in_turns(three, three)
    assert looks == [False, False]


def test_a_store_that_cannot_tell_of_writes_has_nothing_kept(db: Database) -> None:
    watch = Watch(db)
    watch.exact = False
    cache = ResponseCache(watch)
    cache.put(IDENT, cache.writes, LATER, ANSWER)
    assert in_turns(lambda: asked(cache)) == [None]


def test_a_store_in_trouble_is_for_whoever_reads_it(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled(db)

    def fails() -> bool:
        raise OSError("the disk is gone")

    monkeypatch.setattr(cache.watch, "changed", fails)
    assert in_turns(lambda: asked(cache)) == [None]


def test_a_long_request_is_not_kept(db: Database) -> None:
    cache = filled(db)
    long: Ident = (IDENT[0], b"h" * (MAX_REQUEST_BYTES + 1))
    cache.put(long, cache.writes, LATER, ANSWER)
    assert not cache.ask(long, lambda _: None) and len(cache._answers) == 1


def test_memory_has_a_bound(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CACHED", 3)
    cache = filled(db)
    for n in range(10):
        cache.put((f"{n}", IDENT[1]), cache.writes, LATER, ANSWER)
    assert len(cache._answers) <= 3


class Sent:
    """A transport that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.is_closing = lambda: False
        self.get_write_buffer_size = lambda: 0
        self.write = self.writelines = self.told.append

    def close(self) -> None:
        self.told.append("closed")


def corked(use: Callable[[Any], object]) -> list[Any]:
    """What goes out in the turn in which it was written, a mark, and what goes out after it."""

    async def run() -> list[Any]:
        sent = Sent()
        transport: Any = sent
        use(CoalescingTransport(transport, asyncio.get_running_loop()))
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


def test_what_is_written_can_be_copied() -> None:
    def use(transport: CoalescingTransport) -> None:
        transport.write(b"before ")
        transport.copies = []
        for part in (b"head ", b"body"):
            transport.write(part)
        assert transport.copies == [b"head ", b"body"]

    assert corked(use)[-2:] == ["turn", b"body"]


def test_what_nobody_can_read_is_dropped() -> None:
    assert corked(lambda t: (t.write(b"late"), t.drop())) == ["turn"]
