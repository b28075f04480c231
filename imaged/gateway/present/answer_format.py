"""How one dialect answers a request that waits for its pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.responses import Response

from imaged.errors import ImagedError, JobFailed
from imaged.gateway.present.headers import safety_header
from imaged.gateway.present.links import Links
from imaged.jobs import Job


@dataclass(frozen=True)
class AnswerFormat:
    """pictures: of a COMPLETED job and its files; may take long, and runs in a thread.
    error:    of a job that is late, and of one that failed where `failed` is None.
    failed:   of a job that failed, where that is more than an error.
    shows_files: whether `pictures` is given the files, else none.
    """

    pictures: Callable[[Job, Links, Sequence[bytes]], Response]
    error: Callable[[ImagedError], Response]
    failed: Callable[[Job, Links], Response] | None = None
    shows_files: bool = True

    def of_failed(self, job: Job, links: Links) -> Response:
        if self.failed is not None:
            return self.failed(job, links)
        reason, text = job.reason or "job_failed", job.error or "the job failed"
        return self.error(JobFailed(reason, text, safety_header(job)))
