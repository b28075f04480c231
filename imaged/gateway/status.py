"""GET /v2/requests/{id}/status: what every waiting client asks for every second.

Plain ASGI in front of the framework: no routing, no request object, one coalesced read.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

import sqlalchemy as sa
from starlette.types import ASGIApp, Receive, Scope, Send

from imaged.errors import BadParameter, ImagedError, Unavailable, WrongMethod
from imaged.gateway import replies
from imaged.gateway.replies import Links
from imaged.gateway.state import Gateway
from imaged.gateway.wait import read_wait
from imaged.jobs import State

log = logging.getLogger(__name__)

PATH = re.compile(r"/v2/requests/([^/]+)/status")
LONGEST_WAIT_S = 60.0


class Status:
    """Answers status polls; everything else goes on to the app."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match = PATH.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if match is None:
            await self._app(scope, receive, send)
            return
        if scope["method"] not in ("GET", "HEAD"):
            await replies.error(WrongMethod(), {"allow": "GET, HEAD"})(scope, receive, send)
            return
        try:
            code, body = await self._answer(match[1], scope, receive)
        except ImagedError as problem:
            code, body = problem.status or 500, replies.error_body(problem)
        except sa.exc.OperationalError:
            log.exception("the store did not answer")
            away = Unavailable()
            code, body = away.status or 500, replies.error_body(away)
        except Exception:  # nobody behind this would make JSON of it
            log.exception("unexpected")
            code, body = 500, replies.error_body(ImagedError("Internal server error"))
        await _send_json(send, code, body)

    async def _answer(
        self, job_id: str, scope: Scope, receive: Receive
    ) -> tuple[int, dict[str, Any]]:
        headers = {k: v.decode("latin-1") for k, v in scope["headers"]}
        gateway = self._gateway
        key = await gateway.admission.key(headers.get(b"x-api-key"))
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        wait_s, with_preview = _wait_s(query), _with_preview(query)
        job = await gateway.board.settled(key, job_id, wait_s, receive)
        origin = gateway.settings.public_url.rstrip("/") or (
            f"{scope['scheme']}://{headers.get(b'host', 'localhost')}"
        )
        code, body = replies.status(job, Links(origin, gateway.secret))
        if with_preview and job.state is State.PROCESSING and job.preview_call:
            made = await gateway.board.preview(job)
            body.update({"preview": replies.preview(made)} if made else {})
        return code, body


def _with_preview(query: Mapping[str, list[str]]) -> bool:
    """?preview=1: with a small picture of how far it is, when there is one."""
    given = set(query.get("preview", ["0"]))
    if not given <= {"0", "1"} or len(given) > 1:
        raise BadParameter("preview", "should be 0 or 1")
    return given == {"1"}


def _wait_s(query: Mapping[str, list[str]]) -> float:
    """?wait=S: answer when the job has ended, or after S seconds."""
    return read_wait(next(filter(None, query.get("wait", [])), "0"), LONGEST_WAIT_S)


async def _send_json(send: Send, code: int, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": content})
