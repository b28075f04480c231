"""Image jobs: submit (v2), submit and wait (v1), result, cancel."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from imaged.errors import StillRunning
from imaged.gateway.auth import keyed, own_job, owned
from imaged.gateway.context import Gateway
from imaged.gateway.present import bodies
from imaged.gateway.present.errors import error_response
from imaged.gateway.present.headers import safety_header, with_rate_headers
from imaged.gateway.submit import quotes, request_body
from imaged.gateway.submit.admission import Admitted
from imaged.gateway.submit.draft_option import read_draft, refuse_draft
from imaged.gateway.submit.options import read_options
from imaged.gateway.submit.request_body import parse_params
from imaged.jobs import Job, RequestOptions, State
from imaged.params.image_params import ImageParams
from imaged.store.accounts.keys import Key
from imaged.store.jobs import queue


@keyed
async def submit(request: Request, gateway: Gateway, key: Key) -> Response:
    """POST /v2/{slug}: queue a job and answer at once."""
    admitted, warnings = await _admit(request, gateway, key, drafts=True)
    answer = bodies.submitted(admitted.job_id, gateway.links(request), warnings)
    return with_rate_headers(answer, admitted.rate, admitted.replayed)


@keyed
async def create(request: Request, gateway: Gateway, key: Key) -> Response:
    """POST /v1/{slug}: queue a job and answer with its picture."""
    admitted, _ = await _admit(request, gateway, key)
    answer = await _waited(request, gateway, admitted)
    return with_rate_headers(answer, admitted.rate, admitted.replayed)


@owned
async def result(request: Request, gateway: Gateway, job: Job) -> Response:
    """GET /v2/requests/{id}: the result body, complete once the job is COMPLETED."""
    encoded = await gateway.files(job) if job.params.base64 else []
    links = gateway.links(request)
    return await asyncio.to_thread(lambda: _json(job, *bodies.result(job, links, encoded)))


@owned
async def poll(request: Request, gateway: Gateway, job: Job) -> Response:
    """GET /v1/requests/{id}: the older poll_url, status and output in one."""
    return _json(job, *bodies.polled(job, gateway.links(request)))


@owned
async def cancel(request: Request, gateway: Gateway, job: Job) -> Response:
    """DELETE /v2/requests/{id}: end the job, wherever it is, and give its credits back.

    A draft that was shown is charged.
    """
    retention_s = gateway.settings.retention_s
    await gateway.writer.write(lambda c: queue.cancel(c, job.id, time.time(), retention_s))
    after = await own_job(request, gateway)
    return _json(after, 200, bodies.status(after, gateway.links(request))[1])


class OwnRequest(HTTPEndpoint):
    """GET and DELETE on one route, so that a 405 lists both."""

    get = staticmethod(result)
    delete = staticmethod(cancel)


async def _admit(
    request: Request, gateway: Gateway, key: Key, *, drafts: bool = False
) -> tuple[Admitted, list[str]]:
    """Read model and body, then admit; returns the job and warnings."""
    model = await gateway.admission.model(request.path_params["slug"], key)
    sent = await request_body.read(request)
    options = read_options(request.headers)
    if not drafts:
        refuse_draft(sent)

    def drafted(params: ImageParams) -> RequestOptions:
        return replace(options, draft_steps=read_draft(sent, params.num_inference_steps))

    if sent.get(quotes.QUOTE_ID) is not None:
        quote = quotes.redeem(gateway.secret, sent, key.id, model)
        if time.time() > quote.until and not await gateway.admission.repeats(key, options):
            raise quotes.expired()
        options = replace(drafted(quote.params), quoted_micros=quote.cost_micros)
        return await gateway.admission.admit(key, model, quote.params, options), []
    params, warnings = parse_params(request, sent, model.knobs)
    return await gateway.admission.admit(key, model, params, drafted(params)), warnings


async def _waited(request: Request, gateway: Gateway, admitted: Admitted) -> Response:
    """The answer of v1 once the job has ended; 504 if it still runs."""
    job = await gateway.wait_for(request, admitted)
    if not job.state.final:
        return error_response(StillRunning(job.id))
    if job.state is not State.COMPLETED:
        return bodies.failed(job, gateway.links(request))
    files, links = await gateway.files(job), gateway.links(request)
    return await asyncio.to_thread(bodies.picture, job, links, files)


def _json(job: Job, code: int, body: dict[str, Any]) -> Response:
    return JSONResponse(body, code, headers=safety_header(job))
