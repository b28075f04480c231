"""ASGI middleware: limits on headers and bodies, and a deadline for bodies."""

from __future__ import annotations

import asyncio
from itertools import chain

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from imaged.errors import BodyTooLarge, BodyTooSlow, HeadersTooLarge, ImagedError
from imaged.gateway.present.errors import error_response

BODY_S = 30.0  # to receive a whole body
DRAINED = 32 * 1024 * 1024  # bytes of an oversized body that are read, so that 413 arrives
MAX_HEADERS = 65_536  # bytes of all names and values
MAX_HEADER_FIELDS = 100
CLOSE = {"connection": "close"}  # the rest of the body must not be parsed as a request


class BodyLimit:
    """Answers 431, 408 and 413; of methods that have a body the app gets whole ones only."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self._app, self._max_body = app, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (
            len(scope["headers"]) > MAX_HEADER_FIELDS or _size(scope) > MAX_HEADERS
        ):
            problem: ImagedError = HeadersTooLarge(
                f"The headers are over {MAX_HEADERS} bytes or {MAX_HEADER_FIELDS} fields."
            )
            await error_response(problem, CLOSE)(scope, receive, send)
            return
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "DELETE", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_S):
                body = await self._read(receive)
        except TimeoutError:
            await error_response(BodyTooSlow(), CLOSE)(scope, receive, send)
            return
        except ConnectionAbortedError:  # the client disconnected
            return
        if body is None:
            problem = BodyTooLarge(f"The body is larger than {self._max_body} bytes.")
            await error_response(problem, CLOSE)(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, or None if it is too large."""
        chunks: list[bytes] = []
        size, more = 0, True
        while more and size <= DRAINED:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionAbortedError
            more = message.get("more_body", False)
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= self._max_body:
                chunks.append(chunk)
        return b"".join(chunks) if size <= self._max_body else None


def _size(scope: Scope) -> int:
    return sum(map(len, chain.from_iterable(scope["headers"])))


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive() that gives the body once, then what follows it (the disconnect)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
