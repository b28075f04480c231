"""A connection that asks what it asked before, in the turn of the loop in which it asks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from imaged.gateway.transport.connections import Limits
from imaged.gateway.transport.protocol import protocol
from imaged.gateway.transport.response_cache import EXTENSION, ResponseCache
from imaged.store.sql.database import Database, Watch

LATER = 4e9
POLL = b"GET /status HTTP/1.1\r\nhost: x\r\n\r\n"
OTHER = b"GET /other HTTP/1.1\r\nhost: x\r\n\r\n"


class Wire:
    """A transport that notes what is sent."""

    def __init__(self) -> None:
        self.sent, self.closed = b"", False
        self.is_closing = lambda: self.closed
        self.get_write_buffer_size = lambda: 0
        self.pause_reading = self.resume_reading = lambda: None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"sockname": ("127.0.0.1", 1), "peername": ("127.0.0.1", 2)}.get(name, default)

    def write(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed = True

    def paths(self) -> list[str]:
        """What was asked for, of every answer, in order."""
        answers = self.sent.decode().split("HTTP/1.1 200 OK\r\n")[1:]
        return [answer.split("\r\n\r\n")[1] for answer in answers]


async def turns() -> None:
    for _ in range(9):
        await asyncio.sleep(0)


def connected(db: Database, use: Callable[[Any, Wire], None]) -> tuple[Any, Wire, list[str]]:
    """A connection whose answer to POLL is kept, after `use` of it in one turn of the loop; what
    was sent since, and what the app was asked.
    """
    asked: list[str] = []

    async def app(scope: Any, _: Any, send: Any) -> None:
        asked.append(scope["path"])
        if keep := scope.get("extensions", {}).get(EXTENSION):
            keep(cache.writes, LATER)
        headers = [(b"content-length", str(len(scope["path"])).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    cache = ResponseCache(Watch(db))
    cache.check()

    async def run() -> tuple[Any, Wire]:
        config = uvicorn.Config(app, http=protocol(Limits(), cache), proxy_headers=False)
        config.load()
        kind: Any = config.http_protocol_class
        for n in range(2):
            made = kind(config, ServerState(), {})
            wire = Wire()
            made.connection_made(wire)
            if n == 0:
                made.data_received(POLL)
            else:
                use(made, wire)
            await turns()
            made.resume_writing()
            await turns()
        return made, wire

    connection, wire = asyncio.run(run())
    return connection, wire, asked[1:]


def test_the_app_is_not_asked_again(db: Database) -> None:
    connection, wire, asked = connected(db, lambda c, _: c.data_received(POLL))
    assert (wire.paths(), asked) == (["/status"], [])
    assert connection.due is None and connection.waited_since() is not None  # it is idle


def test_more_that_comes_in_the_same_turn_is_answered_after_it(db: Database) -> None:
    def use(connection: Any, _: Wire) -> None:
        for data in (POLL, OTHER[:9], OTHER[9:], POLL):
            connection.data_received(data)

    _, wire, asked = connected(db, use)
    assert wire.paths() == asked == ["/status", "/other", "/status"]


def test_who_hangs_up_in_that_turn_is_told_nothing(db: Database) -> None:
    def use(connection: Any, wire: Wire) -> None:
        connection.data_received(POLL)
        wire.close()
        connection.connection_lost(None)

    _, wire, asked = connected(db, use)
    assert (wire.sent, asked) == (b"", [])


def test_a_server_that_stops_in_that_turn_answers_first(db: Database) -> None:
    def use(connection: Any, _: Wire) -> None:
        connection.data_received(POLL)
        connection.shutdown()

    _, wire, asked = connected(db, use)
    assert wire.paths() == asked == ["/status"] and wire.closed


def test_who_does_not_read_is_left_to_the_app(db: Database) -> None:
    def use(connection: Any, _: Wire) -> None:
        connection.pause_writing()
        connection.data_received(POLL)

    _, wire, asked = connected(db, use)
    assert wire.paths() == asked == ["/status"]


def test_an_answer_that_ends_its_connection_is_not_kept(db: Database) -> None:
    last = POLL.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")

    def use(connection: Any, _: Wire) -> None:
        connection.data_received(last)

    connection, wire, asked = connected(db, use)
    assert asked == ["/status"] and wire.closed
    assert not connection.cache.ask(("127.0.0.1", last), lambda _: None)
