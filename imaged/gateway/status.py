"""GET /v2/requests/{id}/status: what every waiting client asks for every second.

Plain ASGI in front of the framework: no routing, no request object, one coalesced read; and while
nobody writes to the store, an answer that was given once is given again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

import sqlalchemy as sa
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from imaged.errors import BadParameter, ImagedError, Unavailable, WrongMethod
from imaged.gateway import replies
from imaged.gateway.admit import FRESH_S
from imaged.gateway.replies import Links
from imaged.gateway.state import Gateway
from imaged.gateway.wait import read_wait
from imaged.jobs import State
from imaged.store.db import Watch

log = logging.getLogger(__name__)

PATH = re.compile(r"/v2/requests/([^/]+)/status")
LONGEST_WAIT_S = 60.0
MOST_KEPT = 10_000
LONGEST_HOST = 255  # of those for whom an answer is kept; its links repeat it

Ident = tuple[str, bytes, bytes, bytes, str]  # path, query, key, host, scheme
Answer = tuple[Message, Message]


class Kept:
    """Answers that hold while the store stays as it is, each for who shows the same key.

    A write of anyone, be it a worker's progress or a revoked key, ends them all. A store that
    cannot tell of writes (see `Watch`) has none kept. One look serves a turn of the loop: whatever
    is answered in it had arrived before.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch, self._looked = watch, False
        self._answers: dict[Ident, tuple[float, Answer]] = {}
        self.writes = 0  # seen so far

    def get(self, ident: Ident) -> Answer | None:
        if not self._looked:
            self._look()
        until, answer = self._answers.get(ident, (0.0, None))
        return answer if until > time.time() else None

    def put(self, ident: Ident, writes: int, until: float, answer: Answer) -> None:
        """Keep what was read after so many `writes`, `until` its job expires."""
        if self._watch.exact and writes == self.writes and len(ident[3]) <= LONGEST_HOST:
            if len(self._answers) >= MOST_KEPT:
                self._answers.clear()
            self._answers[ident] = until, answer

    def _look(self) -> None:
        self._looked = True
        asyncio.get_running_loop().call_soon(self._next_turn)
        try:
            changed = self._watch.changed()
        except Exception:  # a store in trouble; whoever reads it will say so
            log.exception("the store did not say whether it was written to")
            changed = True
        if changed:
            self._answers.clear()
            self.writes += 1

    def _next_turn(self) -> None:
        self._looked = False


class Again:
    """Answers a status poll with a kept answer; everything else goes on to the app."""

    def __init__(self, app: ASGIApp, kept: Kept) -> None:
        self._app, self._kept = app, kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/status"):
            answer = self._kept.get(_ident(scope))
            if answer is not None and scope["method"] == "GET":
                start, body = answer
                await send({**start})  # middleware on the way puts headers into what it is given
                await send(body)
                return
        await self._app(scope, receive, send)


class Status:
    """Answers status polls from the store; everything else goes on to the app."""

    def __init__(self, app: ASGIApp, gateway: Gateway, kept: Kept) -> None:
        self._app, self._gateway, self._kept = app, gateway, kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match = PATH.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if match is None:
            await self._app(scope, receive, send)
            return
        if scope["method"] not in ("GET", "HEAD"):
            await replies.error(WrongMethod(), {"allow": "GET, HEAD"})(scope, receive, send)
            return
        start, body = await self._answer(match[1], scope, receive)
        await send({**start})
        await send(body)

    async def _answer(self, job_id: str, scope: Scope, receive: Receive) -> Answer:
        """As the store has it now, or why not."""
        try:
            return await self._read(job_id, _ident(scope), receive)
        except ImagedError as problem:
            return _problem(problem)
        except sa.exc.OperationalError:
            log.exception("the store did not answer")
            return _problem(Unavailable())
        except Exception:  # nobody behind this would make JSON of it
            log.exception("unexpected")
            return _problem(ImagedError("Internal server error"))

    async def _read(self, job_id: str, ident: Ident, receive: Receive) -> Answer:
        writes, gateway = self._kept.writes, self._gateway
        _, query_string, shown, host, scheme = ident
        key = await gateway.admission.key(shown.decode("latin-1"))
        query = parse_qs(query_string.decode("latin-1"), keep_blank_values=True)
        wait_s, with_preview = _wait_s(query), _with_preview(query)
        job = await gateway.board.settled(key, job_id, wait_s, receive)
        origin = gateway.settings.public_url.rstrip("/") or f"{scheme}://{host.decode('latin-1')}"
        code, body = replies.status(job, Links(origin, gateway.secret))
        if with_preview and job.state is State.PROCESSING and job.preview_call:
            made = await gateway.board.preview(job)
            body.update({"preview": replies.preview(made)} if made else {})
        answer = _json(code, body)
        if not query_string:
            # No longer than a key is believed: it may have been revoked before this read.
            until = min(time.time() + FRESH_S, job.expires_at or math.inf)
            self._kept.put(ident, writes, until, answer)
        return answer


def _ident(scope: Scope) -> Ident:
    """All that an answer depends on, beside the store."""
    key = host = b""
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            key = key or value
        elif name == b"host":
            host = host or value
    if not host:  # as HTTP/1.0 may
        host = "{}:{}".format(*scope["server"]).encode()
    return scope["path"], scope["query_string"], key, host, scope["scheme"]


def _with_preview(query: Mapping[str, list[str]]) -> bool:
    """?preview=1: with a small picture of how far it is, when there is one."""
    given = set(query.get("preview", ["0"]))
    if not given <= {"0", "1"} or len(given) > 1:
        raise BadParameter("preview", "should be 0 or 1")
    return given == {"1"}


def _wait_s(query: Mapping[str, list[str]]) -> float:
    """?wait=S: answer when the job has ended, or after S seconds."""
    return read_wait(next(filter(None, query.get("wait", [])), "0"), LONGEST_WAIT_S)


def _problem(problem: ImagedError) -> Answer:
    return _json(problem.status or 500, replies.error_body(problem))


def _json(code: int, body: dict[str, Any]) -> Answer:
    content = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    return (
        {"type": "http.response.start", "status": code, "headers": headers},
        {"type": "http.response.body", "body": content},
    )
