"""Headers of answers: rate limit, image checker, errors."""

from __future__ import annotations

import math
from typing import TypeVar

from starlette.responses import Response

from imaged.errors import ImagedError, JobFailed, StillRunning, TooFast
from imaged.gateway.present.units import utc
from imaged.jobs import Job, State
from imaged.store.accounts.rate_limits import RateLimit

R = TypeVar("R", bound=Response)
#: x-safety of a started job that failed for this reason (worker/image_checker.py).
CHECKS = {"content_policy": "on", "checker_unavailable": "unavailable"}


def rate_headers(rate: RateLimit) -> dict[str, str]:
    """The key's token bucket as headers."""
    return {
        "x-rate-limit-limit": str(rate.limit),
        "x-rate-limit-remaining": str(rate.left),
        "x-rate-limit-reset-at-utc": utc(rate.full_at),
    }


def error_headers(problem: ImagedError) -> dict[str, str]:
    """Headers of an error: retry-after, x-request-id, x-safety."""
    if isinstance(problem, TooFast):
        return {
            "retry-after": str(max(1, math.ceil(problem.reset_in_s))),
            "x-rate-limit-reset-at-utc": utc(problem.reset_at),
        }
    if isinstance(problem, JobFailed):
        return dict(problem.headers)
    return {"x-request-id": problem.request_id} if isinstance(problem, StillRunning) else {}


def with_rate_headers(answer: R, rate: RateLimit, repeated: bool) -> R:
    """Add the rate limit, and whether an earlier job was returned."""
    answer.headers.update(rate_headers(rate))
    if repeated:
        answer.headers["idempotent-replayed"] = "true"
    return answer


def safety_header(job: Job) -> dict[str, str]:
    """Whether the operator's checker has looked at the job's pictures, once there were some.

    The header is a list: the server names the rules for prompts on every answer, and this is one
    more entry.
    """
    if job.state is State.COMPLETED and job.result and "checked" in job.result:
        return {"x-safety": f"image-checker={'on' if job.result['checked'] else 'off'}"}
    if job.state is State.FAILED and job.started_at is not None and job.reason in CHECKS:
        return {"x-safety": f"image-checker={CHECKS[job.reason]}"}
    return {}
