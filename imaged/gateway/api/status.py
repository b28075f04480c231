"""GET /v2/requests/{id}/status, which every waiting client asks for every second.

Plain ASGI in front of the framework: no routing, no request object, one coalesced read; answers may
come from the response cache (transport/response_cache.py).
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Mapping
from types import MappingProxyType
from urllib.parse import parse_qs

import msgspec
import sqlalchemy as sa
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from imaged.errors import BadParameter, ImagedError, Unavailable, WrongMethod
from imaged.gateway.context import Gateway
from imaged.gateway.present import bodies
from imaged.gateway.present.answer import UNSET, Body
from imaged.gateway.present.errors import error_body, error_response
from imaged.gateway.present.headers import safety_header
from imaged.gateway.present.links import Links
from imaged.gateway.read.job_reader import read_wait
from imaged.gateway.submit.admission import FRESH_S
from imaged.gateway.transport.response_cache import EXTENSION
from imaged.jobs import State

log = logging.getLogger(__name__)

PATH = re.compile(r"/v2/requests/([^/]+)/status")
MAX_WAIT_S = 60.0

NOTHING: Mapping[str, str] = MappingProxyType({})

Messages = tuple[Message, Message]


class Status:
    """ASGI middleware that answers status polls itself; all else goes to the app."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match = PATH.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if match is None:
            await self._app(scope, receive, send)
            return
        if scope["method"] not in ("GET", "HEAD"):
            await error_response(WrongMethod(), {"allow": "GET, HEAD"})(scope, receive, send)
            return
        for message in await self._answer(match[1], scope, receive):
            await send(message)

    async def _answer(self, job_id: str, scope: Scope, receive: Receive) -> Messages:
        """The answer to a poll, or the error."""
        try:
            return await self._read(job_id, scope, receive)
        except ImagedError as problem:
            return _problem(problem)
        except sa.exc.OperationalError:
            log.exception("the store did not answer")
            return _problem(Unavailable())
        except Exception:  # no error handler of the app is behind this
            log.exception("unexpected")
            return _problem(ImagedError("Internal server error"))

    async def _read(self, job_id: str, scope: Scope, receive: Receive) -> Messages:
        gateway, headers = self._gateway, Headers(scope=scope)
        writes = gateway.cache.writes
        key = await gateway.admission.key(headers.get("x-api-key"))
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        wait_s, with_preview = _wait_s(query), _with_preview(query)
        job = await gateway.reader.wait_for_end(key, job_id, wait_s, receive)
        code, body = bodies.status(job, Links(self._origin(scope, headers), gateway.secret))
        if with_preview and job.state is State.PROCESSING and job.preview_call:
            made = await gateway.reader.preview(job)
            body.preview = bodies.preview(made) if made else UNSET
        keep = scope.get("extensions", {}).get(EXTENSION)  # only of whole requests, see protocol.py
        if keep and not query and headers.get("host"):
            # Not longer than keys are cached: the key may be revoked since.
            keep(writes, min(time.time() + FRESH_S, job.expires_at or math.inf))
        return _json(code, body, safety_header(job))

    def _origin(self, scope: Scope, headers: Headers) -> str:
        host = headers.get("host") or "{}:{}".format(*scope["server"])  # HTTP/1.0 may name none
        return self._gateway.settings.public_url.rstrip("/") or f"{scope['scheme']}://{host}"


def _with_preview(query: Mapping[str, list[str]]) -> bool:
    """?preview=1: with a small picture of how far it is, when there is one."""
    given = set(query.get("preview", ["0"]))
    if not given <= {"0", "1"} or len(given) > 1:
        raise BadParameter("preview", "should be 0 or 1")
    return given == {"1"}


def _wait_s(query: Mapping[str, list[str]]) -> float:
    """?wait=S: answer when the job has ended, or after S seconds."""
    return read_wait(next(filter(None, query.get("wait", [])), "0"), MAX_WAIT_S)


def _problem(problem: ImagedError) -> Messages:
    return _json(problem.status or 500, error_body(problem))


def _json(code: int, body: Body, more: Mapping[str, str] = NOTHING) -> Messages:
    content = msgspec.json.encode(body)
    headers = [
        *((name.encode(), value.encode()) for name, value in more.items()),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    return (
        {"type": "http.response.start", "status": code, "headers": headers},
        {"type": "http.response.body", "body": content},
    )
