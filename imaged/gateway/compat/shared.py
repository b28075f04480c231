"""Shared by the dialects: the form of errors, running a job to its end, refusing fields by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from imaged.catalogue.aliases import widened
from imaged.catalogue.model import Model
from imaged.errors import BadParameter, ImagedError, JobFailed, StillRunning
from imaged.gateway.auth import Endpoint, Handler, keyed
from imaged.gateway.context import Gateway
from imaged.gateway.present.headers import safety_header
from imaged.gateway.submit.admission import Admitted
from imaged.gateway.submit.options import read_options
from imaged.jobs import Job, State
from imaged.params.image_params import read_params
from imaged.store.accounts.keys import Key


def dialect(answer: Callable[[ImagedError], Response]) -> Callable[[Handler], Endpoint]:
    """A `keyed` for the handlers of one dialect: `answer` gives errors that dialect's form."""

    def decorate(handler: Handler) -> Endpoint:
        inner = keyed(handler)

        @wraps(inner)
        async def endpoint(request: Request) -> Response:
            try:
                return await inner(request)
            except ImagedError as problem:
                return answer(problem)

        return endpoint

    return decorate


async def run_and_wait(
    request: Request,
    gateway: Gateway,
    key: Key,
    model: Model,
    params: Mapping[str, Any],
    names: Mapping[str, str],
) -> tuple[Job, list[bytes], Admitted]:
    """Queue a job on the request's terms, wait for it, and its pictures; the ranges are the
    engine's, not the original's.

    `names`: our parameter -> theirs, for refusals. Raises what admission raises, StillRunning,
    or JobFailed.
    """
    try:
        read, _ = read_params(params, widened(model.knobs))
    except BadParameter as problem:
        theirs = names.get(problem.field, problem.field)
        raise BadParameter(theirs, problem.detail.removeprefix(problem.field).strip()) from None
    options = read_options(request.headers)
    admitted = await gateway.admission.admit(key, model, read, options)
    job = await gateway.wait_for(request, admitted)
    if not job.state.final:
        raise StillRunning(job.id)
    if job.state is not State.COMPLETED:
        reason, error = job.reason or "job_failed", job.error or "the job failed"
        raise JobFailed(reason, error, safety_header(job))
    return job, await gateway.files(job), admitted


def refuse_unless(given: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises BadParameter for a field whose value is not supported."""
    for name, values in neutral.items():
        value = given.get(name)
        if value is not None and not any(_same(value, neutral_one) for neutral_one in values):
            shown = " or ".join("empty" if v == [] else json.dumps(v) for v in values)
            raise BadParameter(name, f"is not supported here: leave it out, or send {shown}")


def text(given: Mapping[str, Any], name: str) -> str | None:
    """An optional string field; raises BadParameter."""
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise BadParameter(name, "should be a string")
    return value


def _same(value: Any, neutral: Any) -> bool:
    """Equal, without taking 0 for False."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)
