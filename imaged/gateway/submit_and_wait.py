"""Queue a job, wait for its end, and answer: what v1 and the other dialects do."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from imaged.errors import StillRunning
from imaged.gateway.context import Gateway
from imaged.gateway.present.answer_format import AnswerFormat
from imaged.gateway.present.headers import with_rate_headers
from imaged.jobs import State, Submission
from imaged.store.accounts.keys import Key


async def submit_and_wait(
    request: Request, gateway: Gateway, key: Key, submission: Submission, how: AnswerFormat
) -> Response:
    """The answer in a dialect's format: the pictures, the failure, or StillRunning after `wait_s`,
    when the caller has gone, or when the server stops. Raises what admission raises.
    """
    placed = await gateway.admission.admit(submission)
    wait_s, links = gateway.settings.wait_s, gateway.links(request)
    job = await gateway.reader.wait_for_end(key, placed.job_id, wait_s, request.receive)
    if not job.state.final:
        answer = how.error(StillRunning(job.id))
    elif job.state is not State.COMPLETED:
        answer = how.of_failed(job, links)
    else:
        files = await gateway.files(job) if how.shows_files else ()
        answer = await asyncio.to_thread(how.pictures, job, links, files)
    return with_rate_headers(answer, placed.rate, placed.repeated)
