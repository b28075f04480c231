"""The handlers of the main job. v1 is v2 plus waiting: one path into the queue."""

from __future__ import annotations

import asyncio
import json
import math
import time
from typing import Any

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from imaged.errors import (
    BadParameter,
    MalformedBody,
    StillRunning,
    UnknownPath,
    UnknownRequest,
    WrongContentType,
)
from imaged.gateway import replies
from imaged.gateway.admit import Admitted
from imaged.gateway.state import Gateway
from imaged.gateway.terms import read_terms
from imaged.jobs import Job, State
from imaged.params import KNOBS, ImageParams, read_params
from imaged.store import blobs, queue


async def submit(request: Request) -> Response:
    """POST /v2/{slug}"""
    gateway = Gateway.of(request)
    admitted, warnings = await _admit(request, gateway)
    answer = replies.submitted(admitted.job_id, gateway.links(request), warnings)
    return replies.marked(answer, admitted.replayed)


async def create(request: Request) -> Response:
    """POST /v1/{slug}"""
    gateway = Gateway.of(request)
    admitted, _ = await _admit(request, gateway)
    job = await gateway.board.settled(admitted.job_id, gateway.settings.wait_s)
    if job is None or not job.state.final:
        answer = replies.error(StillRunning(), {"x-request-id": admitted.job_id})
    elif job.state is not State.COMPLETED:
        answer = replies.failed(job, gateway.links(request))
    else:
        answer = replies.picture(job, gateway.links(request), await _files(gateway, job))
    return replies.marked(answer, admitted.replayed)


async def result(request: Request) -> Response:
    """GET /v2/requests/{id}"""
    gateway = Gateway.of(request)
    job = await own_job(request, gateway)
    encoded = await _files(gateway, job) if job.params.base64 else []
    return _json(*replies.result(job, gateway.links(request), encoded))


async def poll(request: Request) -> Response:
    """GET /v1/requests/{id}"""
    gateway = Gateway.of(request)
    return _json(*replies.polled(await own_job(request, gateway), gateway.links(request)))


async def cancel(request: Request) -> Response:
    """DELETE /v2/requests/{id}"""
    gateway = Gateway.of(request)
    job = await own_job(request, gateway)
    await asyncio.wrap_future(
        gateway.writer.submit(
            lambda c: queue.cancel(c, job.id, time.time(), gateway.settings.retention_s)
        )
    )
    after = await own_job(request, gateway)
    return JSONResponse(replies.status(after, gateway.links(request))[1])


class OwnRequest(HTTPEndpoint):
    """/v2/requests/{id}: one route, so that a wrong method hears of both right ones."""

    get = staticmethod(result)
    delete = staticmethod(cancel)


async def file(request: Request) -> Response:
    """GET /files/{name}?exp=&sig="""
    gateway = Gateway.of(request)
    name = request.path_params["name"]
    query = request.query_params
    signed = blobs.NAME.fullmatch(name) and blobs.verify(
        gateway.secret, name, query.get("exp", ""), query.get("sig", ""), time.time()
    )
    content = await asyncio.to_thread(gateway.blobs.read, name) if signed else None
    if content is None:
        raise UnknownPath("There is no such file, or the link has expired.")
    headers = {
        "cache-control": "private, max-age=3600",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    return Response(content, media_type="image/jpeg", headers=headers)


async def own_job(request: Request, gateway: Gateway) -> Job:
    """The job in the path if this key owns it; a foreign one is as unknown as none."""
    key = await gateway.admission.key(request.headers.get("x-api-key"))
    job_id = request.path_params["job_id"]
    job = await gateway.board.job(job_id)
    if job is None or job.key_id != key.id:
        raise UnknownRequest(f"Request {job_id[:64]} not found")
    return job


async def _admit(request: Request, gateway: Gateway) -> tuple[Admitted, list[str]]:
    """Key, model, terms, body, then the one transaction; the job and warnings."""
    key = await gateway.admission.key(request.headers.get("x-api-key"))
    model = await gateway.admission.model(request.path_params["slug"])
    terms = read_terms(request.headers)
    params, ignored = await read_body(request)
    admitted = await gateway.admission.admit(key, model, params, terms)
    return admitted, [f"unknown field ignored: {name}" for name in ignored]


async def read_body(request: Request) -> tuple[ImageParams, list[str]]:
    """The JSON body as parameters; size and deadline are the middleware's."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise WrongContentType()
    try:
        body = json.loads(
            await request.body(), parse_float=_float, parse_int=_int, object_pairs_hook=_object
        )
    except (ValueError, RecursionError):
        raise MalformedBody() from None
    return read_params(body)


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else math.inf


def _int(text: str) -> int | float:
    return int(text) if len(text) <= 400 else math.inf  # refused later, under its field's name


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a parameter given twice is refused, whichever of the two was meant."""
    body = dict(pairs)
    if len(body) < len(pairs):
        names = [name for name, _ in pairs]
        for name in (n for knob in KNOBS for n in (knob.name, *knob.aliases)):
            if names.count(name) > 1:
                raise BadParameter(name, "should be given once, not twice")
    return body


async def _files(gateway: Gateway, job: Job) -> list[bytes]:
    if job.state is not State.COMPLETED or job.result is None:
        return []
    names = [image["name"] for image in job.result["images"]]
    files = await asyncio.to_thread(lambda: [gateway.blobs.read(name) for name in names])
    found = [content for content in files if content is not None]
    if len(found) < len(names):  # it expired a moment ago
        raise UnknownRequest(f"Request {job.id} not found")
    return found


def _json(code: int, body: dict[str, Any]) -> Response:
    return JSONResponse(body, code)
