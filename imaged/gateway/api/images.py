"""Image jobs: submit (v2), submit and wait (v1), result, cancel."""

from __future__ import annotations

import asyncio
import time

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from imaged.gateway.auth import keyed, own_job, owned
from imaged.gateway.context import Gateway
from imaged.gateway.present import bodies
from imaged.gateway.present.answer import Answer
from imaged.gateway.present.answer_format import AnswerFormat
from imaged.gateway.present.bodies import JobBody, PicturesInBase64, Result, Submitted
from imaged.gateway.present.errors import error_response
from imaged.gateway.present.headers import safety_header, with_rate_headers
from imaged.gateway.submit.quotes import QUOTE_ID
from imaged.gateway.submit.submission import DRAFT, read_asked, read_submission
from imaged.gateway.submit_and_wait import submit_and_wait
from imaged.jobs import Job, Submission
from imaged.store.accounts.keys import Key
from imaged.store.jobs import queue

V1 = AnswerFormat(bodies.picture, error_response, bodies.failed)


@keyed
async def submit(request: Request, gateway: Gateway, key: Key) -> Answer[Submitted]:
    """POST /v2/{slug}: queue a job and answer at once."""
    submission = await _read(request, gateway, key, DRAFT, QUOTE_ID)
    placed = await gateway.admission.admit(submission)
    answer = bodies.submitted(placed.job_id, gateway.links(request), submission.warnings)
    return with_rate_headers(answer, placed.rate, placed.repeated)


@keyed
async def create(
    request: Request, gateway: Gateway, key: Key
) -> Answer[PicturesInBase64] | Response:
    """POST /v1/{slug}: queue a job and answer with its picture."""
    submission = await _read(request, gateway, key, QUOTE_ID)
    return await submit_and_wait(request, gateway, key, submission, V1)


@owned
async def result(request: Request, gateway: Gateway, job: Job) -> Answer[Result] | Answer[JobBody]:
    """GET /v2/requests/{id}: the result body, complete once the job is COMPLETED."""
    encoded = await gateway.files(job) if job.params.base64 else []
    links = gateway.links(request)
    if not bodies.is_completed(job):
        return _status(job, *bodies.status(job, links))
    body = await asyncio.to_thread(bodies.completed, job, links, encoded)
    return await asyncio.to_thread(Answer, body, 200, safety_header(job))


@owned
async def poll(request: Request, gateway: Gateway, job: Job) -> Answer[JobBody]:
    """GET /v1/requests/{id}: the older poll_url, status and output in one."""
    return _status(job, *bodies.polled(job, gateway.links(request)))


@owned
async def cancel(request: Request, gateway: Gateway, job: Job) -> Answer[JobBody]:
    """DELETE /v2/requests/{id}: end the job, wherever it is, and give its credits back.

    A draft that was shown is charged.
    """
    retention_s = gateway.settings.retention_s
    await gateway.writer.write(lambda c: queue.cancel(c, job.id, time.time(), retention_s))
    after = await own_job(request, gateway)
    return _status(after, 200, bodies.status(after, gateway.links(request))[1])


class OwnRequest(HTTPEndpoint):
    """GET and DELETE on one route, so that a 405 lists both."""

    get = staticmethod(result)
    delete = staticmethod(cancel)


async def _read(request: Request, gateway: Gateway, key: Key, *also: str) -> Submission:
    model = await gateway.admission.model(request.path_params["slug"], key)
    asked = await read_asked(request, model, *also)
    return read_submission(gateway.secret, key.id, request.headers, asked)


def _status(job: Job, code: int, body: JobBody) -> Answer[JobBody]:
    return Answer(body, code, safety_header(job))
