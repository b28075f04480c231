"""The socket's side of a connection: how long it may take, how much it may send, how many it
may be. uvicorn has no deadline for a request that never arrives; this adds one.

A connection that has not brought its headers, or its body, in time is cut off; so is one that
does not read its answer. When an address, or the server, has too many connections, the one that
has kept us waiting longest makes room for the new one: for its request, for its next one, or for
its reading of an answer.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from imaged.errors import HeadersTooLarge, ImagedError
from imaged.gateway import replies
from imaged.gateway.kept import EXTENSION, Kept
from imaged.gateway.middleware import BODY_S, MAX_HEADERS

SWEEP_S = 0.5
SMALL = 65_536  # bytes that are sooner copied than sent by themselves


@dataclass(frozen=True)
class Limits:
    """Seconds, and connections open at a time."""

    connections: int = 4000
    per_address: int = 1000
    headers_s: float = 10.0  # from the first byte, or from connecting, to the last header
    body_s: float = BODY_S + 5  # the app answers 408 first
    send_s: float = 30.0  # to read an answer, and a second more for every `bytes_per_s` of it
    bytes_per_s: float = 4096.0
    longest_send_s: float = 120.0  # whatever its size

    def reading_s(self, size: int) -> float:
        """How long a caller may take to read what waits for it."""
        return min(self.send_s + size / self.bytes_per_s, self.longest_send_s)


class Doors:
    """The open connections of one server."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._open: dict[str, set[Edge]] = {}
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, connection: Edge) -> bool:
        """Let a connection in, if need be in another's place; False if there is no room."""
        same = self._open.get(connection.address, set())
        if len(same) >= self.limits.per_address and not self._make_room(same):
            return False
        if self._count >= self.limits.connections and not self._make_room(self._all()):
            return False
        self._open.setdefault(connection.address, set()).add(connection)
        self._count += 1
        if self._timer is None:
            self._timer = connection.loop.call_later(SWEEP_S, self._sweep, connection.loop)
        return True

    def leave(self, connection: Edge) -> None:
        """Forget a connection; one that was never let in is nothing to forget."""
        same = self._open.get(connection.address)
        if same is not None and connection in same:
            same.discard(connection)
            self._count -= 1
            if not same:
                del self._open[connection.address]

    def _make_room(self, connections: set[Edge]) -> bool:
        waited_for = [(since, c) for c in connections if (since := c.waited_since()) is not None]
        if not waited_for:
            return False
        _, slowest = min(waited_for, key=lambda pair: pair[0])
        self.leave(slowest)
        slowest.cut()
        return True

    def _all(self) -> set[Edge]:
        return {connection for same in self._open.values() for connection in same}

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in self._all():
            if connection.overdue(now):
                connection.cut()
        self._timer = loop.call_later(SWEEP_S, self._sweep, loop) if self._count else None


class Corked:
    """A transport on which the two small writes of an answer, headers and body, are one."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop, self._held = transport, loop, b""
        self.copies: list[bytes] | None = None  # of all that is written, if somebody wants them
        self.is_closing = transport.is_closing
        self.get_write_buffer_size = transport.get_write_buffer_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """At once what follows another write; else when the loop has gone round, if not before."""
        if self.copies is not None:
            self.copies.append(data)
        if not self._held and len(data) <= SMALL:
            self._held = data
            self._loop.call_soon(self.flush)
        else:
            self.flush(data)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def drop(self) -> None:
        """Forget what is held: there is nobody to send it to."""
        self._held = b""

    def flush(self, more: bytes = b"") -> None:
        held, self._held = self._held, b""
        if len(more) > SMALL:  # not worth a copy
            self._transport.writelines([held, more])
        elif held or more:
            self._transport.write(held + more)


class Edge(HttpToolsProtocol):
    """uvicorn's protocol with deadlines. `due` is when what we wait for must be here (seconds
    of the loop's clock), None while the caller waits for us.
    """

    doors: Doors
    kept: Kept

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = Corked(transport, self.loop)  # type: ignore[assignment]
        self.address = self.client[0] if self.client else ""
        self.since = self.loop.time()
        self.due: float | None = None
        self._unread = 0  # bytes at the last sweep
        self._read_by: float | None = None  # when the answer must have been read
        self._stalled: float | None = None  # since when none of it is read
        self._head = 0  # bytes of headers so far
        self._in_head, self._refused = True, False
        self._between, self._begun = True, 0  # two requests, and those begun in what came last
        self._asked = b""  # a request that waits for its kept answer
        self._keeping: tuple[bytes, int, float] | None = None  # for what, and see `Kept.put`
        self._running: Any = None  # the request that the app has in hand
        self._wait(self.doors.limits.headers_s)
        if not self.doors.enter(self):
            self.cut()

    def eof_received(self) -> None:
        self.transport.flush()  # type: ignore[attr-defined]  # the transport closes after this
        super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.doors.leave(self)
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self._asked:  # more came before it had its answer: all is parsed
            data, self._asked = self._asked + data, b""
        elif self._idle() and self._ask(data):
            return
        self._parse(data)

    def _ask(self, data: bytes) -> bool:
        """Whether there is a kept answer, and one who reads it."""
        if self.flow.write_paused or not self.kept.ask((self.address, data), self._again):
            return False
        self._asked = data
        return True

    def _again(self, answer: bytes | None) -> None:
        """Send a kept answer, or find one if it holds no more."""
        data, self._asked = self._asked, b""
        if not data or self.transport.is_closing():
            return
        if answer is None:
            self._parse(data)
            return
        self._unset_keepalive_if_required()
        self.due = None
        self.transport.flush(answer)  # type: ignore[attr-defined]
        self.on_response_complete()

    def _parse(self, data: bytes) -> None:
        alone, self._begun = self._between, 0
        if self.due is None and (self.cycle is None or self.cycle.response_complete):
            self._wait(self.doors.limits.headers_s)
        super().data_received(data)
        if self._in_head:
            self._head += len(data)
            if self._head > MAX_HEADERS:
                self._refuse(HeadersTooLarge(f"The headers are over {MAX_HEADERS} bytes."))
        elif alone and self._between and self._begun == 1 and not self.transport.is_closing():
            # One whole request, and the app has not seen it yet.
            keep: Any = partial(self._keep, data)
            self.scope["extensions"] = {EXTENSION: keep}

    def _keep(self, data: bytes, writes: int, until: float) -> None:
        """Keep the answer that the app is about to send, for whoever sends this again."""
        self._keeping = data, writes, until
        self.transport.copies = []  # type: ignore[attr-defined]

    def shutdown(self) -> None:
        self._again(None)  # who has asked is answered first
        super().shutdown()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head, self._in_head, self._between = 0, True, False
        self._begun += 1
        if self.due is None:
            self._wait(self.doors.limits.headers_s)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._wait(self.doors.limits.body_s)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self.due, self._between = None, True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.due is None:
            self.since = self.loop.time()
        if self._keeping is not None:
            self._put()
        super().on_response_complete()

    def _put(self) -> None:
        assert self._keeping is not None
        (data, writes, until), self._keeping = self._keeping, None
        copies, self.transport.copies = self.transport.copies, None  # type: ignore[attr-defined]
        if self._running.keep_alive:
            self.kept.put((self.address, data), writes, until, b"".join(copies))

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def overdue(self, now: float) -> bool:
        """True if the caller is too slow, in sending or in reading."""
        unread, before = self.transport.get_write_buffer_size(), self._unread
        self._unread = unread
        if not unread:
            self._read_by = None
        elif self._read_by is None:
            self._read_by = now + self.doors.limits.reading_s(unread)
        if unread < before or not before:
            self._stalled = None
        elif self._stalled is None:
            self._stalled = now
        return any(by is not None and now > by for by in (self.due, self._read_by))

    def waited_since(self) -> float | None:
        """Since when the caller keeps us waiting; None while it waits for us.

        Who reads, however slowly, has kept us waiting since now: all others go first.
        """
        if self.due is not None:
            return self.since
        if self.transport.get_write_buffer_size():
            return self.loop.time() if self._stalled is None else self._stalled
        return self.since if self._idle() else None

    def _idle(self) -> bool:
        return self._between and (self.cycle is None or self.cycle.response_complete)

    def cut(self) -> None:
        """End the connection at once, whatever is still unsent."""
        self._forget()
        self.transport.abort()

    def _forget(self) -> None:
        """What is unsent, and what the app still says, of all requests in hand, goes nowhere."""
        for cycle in (self._running, self.cycle, *(queued for queued, _ in self.pipeline)):
            if cycle is not None:
                cycle.disconnected = True
        self.transport.drop()  # type: ignore[attr-defined]

    def _wait(self, seconds: float) -> None:
        self.since = self.loop.time()
        self.due = self.since + seconds

    def _refuse(self, problem: ImagedError) -> None:
        """Answer before the app could; what still comes is thrown away until the deadline."""
        self._refused = True
        content = json.dumps(replies.error_body(problem)).encode()
        headers = [
            *self.server_state.default_headers,  # as uvicorn puts them on every other answer
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
        ]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(STATUS_LINE[problem.status or 400] + head + b"\r\n" + content)


def protocol(limits: Limits, kept: Kept) -> type[Any]:
    """The protocol class of one server, for uvicorn's `http`."""
    return type("Edge", (Edge,), {"doors": Doors(limits), "kept": kept})
