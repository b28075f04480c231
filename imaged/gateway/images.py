"""The handlers of the main job. v1 is v2 plus waiting: one path into the queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from imaged.errors import StillRunning, UnknownPath
from imaged.gateway import body, quotes, replies
from imaged.gateway.access import keyed, own_job, owned, public
from imaged.gateway.admit import Admitted
from imaged.gateway.drafts import FIELD, read_draft, refuse_draft
from imaged.gateway.state import Gateway
from imaged.gateway.terms import read_terms
from imaged.jobs import Job, State, Terms
from imaged.params import ImageParams, Knob, read_params
from imaged.store import blobs, queue
from imaged.store.keys import Key


@keyed
async def submit(request: Request, gateway: Gateway, key: Key) -> Response:
    """POST /v2/{slug}: queue a job and answer at once."""
    admitted, warnings = await _admit(request, gateway, key, drafts=True)
    answer = replies.submitted(admitted.job_id, gateway.links(request), warnings)
    return replies.marked(answer, admitted.share, admitted.replayed)


@keyed
async def create(request: Request, gateway: Gateway, key: Key) -> Response:
    """POST /v1/{slug}: queue a job and answer with its picture."""
    admitted, _ = await _admit(request, gateway, key)
    answer = await _waited(request, gateway, admitted)
    return replies.marked(answer, admitted.share, admitted.replayed)


@owned
async def result(request: Request, gateway: Gateway, job: Job) -> Response:
    """GET /v2/requests/{id}: the result body, complete once the job is COMPLETED."""
    encoded = await gateway.files(job) if job.params.base64 else []
    links = gateway.links(request)
    return await asyncio.to_thread(lambda: _json(job, *replies.result(job, links, encoded)))


@owned
async def poll(request: Request, gateway: Gateway, job: Job) -> Response:
    """GET /v1/requests/{id}: the older poll_url, status and output in one."""
    return _json(job, *replies.polled(job, gateway.links(request)))


@owned
async def cancel(request: Request, gateway: Gateway, job: Job) -> Response:
    """DELETE /v2/requests/{id}: end the job, wherever it is, and give its credits back.

    A draft that was shown is charged.
    """
    await asyncio.wrap_future(
        gateway.writer.submit(
            lambda c: queue.cancel(c, job.id, time.time(), gateway.settings.retention_s)
        )
    )
    after = await own_job(request, gateway)
    return _json(after, 200, replies.status(after, gateway.links(request))[1])


class OwnRequest(HTTPEndpoint):
    """/v2/requests/{id}: one route, so that a wrong method hears of both right ones."""

    get = staticmethod(result)
    delete = staticmethod(cancel)


@public
async def file(request: Request) -> Response:
    """GET /files/{name}?exp=&sig=: a picture, to anyone who has its link."""
    gateway = Gateway.of(request)
    name = request.path_params["name"]
    query = request.query_params
    signed = blobs.PICTURE.fullmatch(name) and blobs.verify(
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
    return Response(content, media_type=replies.media_type(name), headers=headers)


async def _admit(
    request: Request, gateway: Gateway, key: Key, *, drafts: bool = False
) -> tuple[Admitted, list[str]]:
    """Model, body, then the one transaction; the job and the warnings."""
    model = await gateway.admission.model(request.path_params["slug"], key)
    sent = await body.read(request)
    terms = read_terms(request.headers)
    if not drafts:
        refuse_draft(sent)

    def drafted(params: ImageParams) -> Terms:
        return replace(terms, draft_steps=read_draft(sent, params.num_inference_steps))

    if sent.get(quotes.FIELD) is not None:
        quote = quotes.redeem(gateway.secret, sent, key.id, model)
        if time.time() > quote.until and not await gateway.admission.repeats(key, terms):
            raise quotes.over()
        terms = replace(drafted(quote.params), quoted_micros=quote.cost_micros)
        return await gateway.admission.admit(key, model, quote.params, terms), []
    params, warnings = understood(request, sent, model.knobs)
    return await gateway.admission.admit(key, model, params, drafted(params)), warnings


async def _waited(request: Request, gateway: Gateway, admitted: Admitted) -> Response:
    """The answer of v1 once the job has ended, or that it still runs."""
    job_id, wait_s = admitted.job_id, gateway.settings.wait_s
    job = await gateway.board.settled(admitted.key, job_id, wait_s, request.receive)
    if not job.state.final:
        return replies.error(StillRunning(job_id))
    if job.state is not State.COMPLETED:
        return replies.failed(job, gateway.links(request))
    files, links = await gateway.files(job), gateway.links(request)
    return await asyncio.to_thread(replies.picture, job, links, files)


def understood(
    request: Request, sent: Mapping[str, Any], knobs: tuple[Knob, ...]
) -> tuple[ImageParams, list[str]]:
    """A body as parameters, and what of it was not taken as it stands.

    A caller who accepts PNG and not JPEG gets PNG.
    """
    params, ignored = read_params(sent, knobs)
    warnings = [f"unknown field ignored: {name}" for name in ignored if name != FIELD]
    scheduler = sent.get("scheduler")
    if scheduler is not None and scheduler != params.scheduler:
        warnings.append(f"scheduler was read as {params.scheduler}")
    accepted = request.headers.get("accept", "")
    if "image/png" in accepted and "image/jpeg" not in accepted and "*" not in accepted:
        params = replace(params, output_format="png")
    return params, warnings


def _json(job: Job, code: int, body: dict[str, Any]) -> Response:
    return JSONResponse(body, code, headers=replies.checked(job))
