"""uvicorn's HTTP protocol with deadlines (for headers, bodies and reading answers), connection
limits and a cache of polls. uvicorn itself waits for ever for a request that never arrives.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from imaged.errors import HeadersTooLarge, ImagedError
from imaged.gateway.present.errors import error_body
from imaged.gateway.transport.body_limit import MAX_HEADERS
from imaged.gateway.transport.connections import ConnectionLimiter, Limits
from imaged.gateway.transport.response_cache import EXTENSION, ResponseCache

SMALL = 65_536  # bytes up to which copying is cheaper than a second write


class CoalescingTransport:
    """Coalesces header and body of an answer into one write (like TCP_CORK)."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop, self._held = transport, loop, b""
        self.copies: list[bytes] | None = None  # copies of what is written, unless None
        self.is_closing = transport.is_closing
        self.get_write_buffer_size = transport.get_write_buffer_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Hold a small write until the next one, or until the loop's next iteration."""
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
        """Discard a held write."""
        self._held = b""

    def flush(self, more: bytes = b"") -> None:
        held, self._held = self._held, b""
        if len(more) > SMALL:  # not worth a copy
            self._transport.writelines([held, more])
        elif held or more:
            self._transport.write(held + more)


class DeadlineProtocol(HttpToolsProtocol):
    """One connection. due: when what we wait for must have arrived, seconds of the loop's clock;
    None while the client waits for us.
    """

    limiter: ConnectionLimiter
    cache: ResponseCache

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = CoalescingTransport(transport, self.loop)  # type: ignore[assignment]
        self.address = self.client[0] if self.client else ""
        self.since = self.loop.time()
        self.due: float | None = None
        self._unread = 0  # bytes of the answer unread at the last sweep
        self._read_by: float | None = None  # when the answer must have been read
        self._stalled: float | None = None  # since when the client reads nothing
        self._head = 0  # bytes of headers so far
        self._in_head, self._refused = True, False
        self._no_request, self._begun = True, 0  # begun: requests in the last data
        self._asked = b""  # a request that waits for its cached answer
        #: The request whose answer goes into the cache, and what `ResponseCache.put` takes.
        self._keeping: tuple[bytes, int, float] | None = None
        self._running: Any = None  # the request cycle that the app runs
        self._wait(self.limiter.limits.headers_s)
        if not self.limiter.enter(self):
            self.cut()

    def eof_received(self) -> None:
        self.transport.flush()  # type: ignore[attr-defined]  # the transport closes after this
        super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.limiter.leave(self)
        self._discard()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self._asked:  # more data before the cached answer: parse all of it
            data, self._asked = self._asked + data, b""
        elif self._idle() and self._ask_cache(data):
            return
        self._parse(data)

    def _ask_cache(self, data: bytes) -> bool:
        """Ask the cache; False if it has no answer, or if the client reads nothing."""
        if self.flow.write_paused or not self.cache.ask((self.address, data), self._on_cached):
            return False
        self._asked = data
        return True

    def _on_cached(self, answer: bytes | None) -> None:
        """Send the cached answer; parse the request if there is none any more."""
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
        alone, self._begun = self._no_request, 0
        if self.due is None and (self.cycle is None or self.cycle.response_complete):
            self._wait(self.limiter.limits.headers_s)
        super().data_received(data)
        if self._in_head:
            self._head += len(data)
            if self._head > MAX_HEADERS:
                self._refuse(HeadersTooLarge(f"The headers are over {MAX_HEADERS} bytes."))
        elif alone and self._no_request and self._begun == 1 and not self.transport.is_closing():
            # One whole request, which the app has not seen yet.
            keep: Any = partial(self._keep, data)
            self.scope["extensions"] = {EXTENSION: keep}

    def _keep(self, data: bytes, writes: int, until: float) -> None:
        """Called by the app: cache the answer that it is about to send."""
        self._keeping = data, writes, until
        self.transport.copies = []  # type: ignore[attr-defined]

    def shutdown(self) -> None:
        self._on_cached(None)  # answer what was asked first
        super().shutdown()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head, self._in_head, self._no_request = 0, True, False
        self._begun += 1
        if self.due is None:
            self._wait(self.limiter.limits.headers_s)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._wait(self.limiter.limits.body_s)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self.due, self._no_request = None, True
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
            self.cache.put((self.address, data), writes, until, b"".join(copies))

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def overdue(self, now: float) -> bool:
        """Whether the client is too slow, in sending or in reading."""
        unread, before = self.transport.get_write_buffer_size(), self._unread
        self._unread = unread
        if not unread:
            self._read_by = None
        elif self._read_by is None:
            self._read_by = now + self.limiter.limits.reading_s(unread)
        if unread < before or not before:
            self._stalled = None
        elif self._stalled is None:
            self._stalled = now
        return any(by is not None and now > by for by in (self.due, self._read_by))

    def waited_since(self) -> float | None:
        """Since when the client keeps us waiting; None while it waits for us. A client that reads,
        however slowly, counts as waiting since now.
        """
        if self.due is not None:
            return self.since
        if self.transport.get_write_buffer_size():
            return self.loop.time() if self._stalled is None else self._stalled
        return self.since if self._idle() else None

    def _idle(self) -> bool:
        return self._no_request and (self.cycle is None or self.cycle.response_complete)

    def cut(self) -> None:
        """Abort the connection; what is unsent is lost."""
        self._discard()
        self.transport.abort()

    def _discard(self) -> None:
        """Discard what is unsent, and what the app still sends, of all open requests."""
        for cycle in (self._running, self.cycle, *(queued for queued, _ in self.pipeline)):
            if cycle is not None:
                cycle.disconnected = True
        self.transport.drop()  # type: ignore[attr-defined]

    def _wait(self, seconds: float) -> None:
        self.since = self.loop.time()
        self.due = self.since + seconds

    def _refuse(self, problem: ImagedError) -> None:
        """Answer an error without the app; further data is discarded until the deadline."""
        self._refused = True
        content = msgspec.json.encode(error_body(problem))
        headers = [
            *self.server_state.default_headers,  # as uvicorn puts them on every other answer
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
        ]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(STATUS_LINE[problem.status or 400] + head + b"\r\n" + content)


def protocol(limits: Limits, cache: ResponseCache) -> type[Any]:
    """A protocol class for uvicorn's `http` option, with its own limiter."""
    return type(
        "DeadlineProtocol",
        (DeadlineProtocol,),
        {"limiter": ConnectionLimiter(limits), "cache": cache},
    )
