"""What an answer looks like: jobs and errors to bodies and headers. No I/O.

Pictures in base64 are megabytes of text: answers that may hold them are made in a thread.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from starlette.responses import JSONResponse, Response

from imaged.errors import ImagedError, JobFailed, StillRunning, TooFast
from imaged.jobs import Job, Preview, State
from imaged.store import blobs
from imaged.store.limits import Share

#: What made a picture, as results name it (worker/deliver.py).
STAMP = ("checkpoint", "determinism", "engine", "device", "dtype")
WIRE = {State.CANCELLED: State.FAILED, State.PARKED: State.PROCESSING}
#: What a checker has done when a job that was begun failed for this reason (worker/check.py).
CHECKS = {"content_policy": "on", "checker_unavailable": "unavailable"}


@dataclass(frozen=True)
class Links:
    """Absolute URLs for one request's origin."""

    origin: str
    secret: bytes

    def job(self, job_id: str) -> dict[str, str]:
        return {
            "poll_url": f"{self.origin}/v1/requests/{job_id}",
            "status_url": f"{self.origin}/v2/requests/{job_id}/status",
            "response_url": f"{self.origin}/v2/requests/{job_id}",
        }

    def file(self, job: Job, name: str) -> str:
        assert job.expires_at is not None
        return self.signed(name, int(job.expires_at))

    def signed(self, name: str, expires_at: int) -> str:
        """A link to a picture file that works for anyone until `expires_at`."""
        return f"{self.origin}/files/{name}?{blobs.sign(self.secret, name, expires_at)}"


def dollars(micros: int) -> float:
    return micros / 1_000_000


def utc(at: float) -> str:
    """Seconds since 1970 -> ISO 8601 in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat()


def media_type(name: str) -> str:
    """Of a picture file, by its ending."""
    return "image/png" if name.endswith(".png") else "image/jpeg"


def share_headers(share: Share) -> dict[str, str]:
    """What the key may still submit, and when it may submit all of it again."""
    return {
        "x-rate-limit-limit": str(share.limit),
        "x-rate-limit-remaining": str(share.left),
        "x-rate-limit-reset-at-utc": utc(share.full_at),
    }


def error_headers(problem: ImagedError) -> dict[str, str]:
    """When the key may ask again, the job to come back for, or what looked at its pictures."""
    if isinstance(problem, TooFast):
        return {
            "retry-after": str(max(1, math.ceil(problem.reset_in_s))),
            "x-rate-limit-reset-at-utc": utc(problem.reset_at),
        }
    if isinstance(problem, JobFailed):
        return dict(problem.headers)
    return {"x-request-id": problem.request_id} if isinstance(problem, StillRunning) else {}


def error(problem: ImagedError, headers: Mapping[str, str] | None = None) -> Response:
    """`{"error": text, "code": word}` under the error's status."""
    extra = {**(headers or {}), **error_headers(problem)}
    return JSONResponse(error_body(problem), problem.status or 500, headers=extra)


def error_body(problem: ImagedError) -> dict[str, Any]:
    return {"error": problem.detail, "code": problem.code}


def submitted(job_id: str, links: Links, warnings: Sequence[str]) -> Response:
    body = {"request_id": job_id, "status": State.QUEUED, **links.job(job_id)}
    if warnings:
        return JSONResponse({**body, "warnings": list(warnings)}, headers={"x-request-id": job_id})
    return JSONResponse(body, headers={"x-request-id": job_id})


def marked(answer: Response, share: Share, replayed: bool) -> Response:
    """The answer to a submit: what the key has left, and whether it tells of an earlier job."""
    answer.headers.update(share_headers(share))
    if replayed:
        answer.headers["idempotent-replayed"] = "true"
    return answer


def status(job: Job, links: Links) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of the status endpoint, in every state."""
    links_of_job = links.job(job.id)
    body: dict[str, Any] = {
        "status": wire_state(job),
        "request_id": job.id,
        "status_url": links_of_job["status_url"],
        "response_url": links_of_job["response_url"],
        "metrics": metrics(job),
    }
    if wire_state(job) == State.FAILED:
        return 422, {**body, "error": job.error, "code": job.reason}
    if wire_state(job) == State.PROCESSING:
        body.update(steps_done(job))
    if job.state is State.PARKED:
        body.update(_parked(job, links))
    return 200, body


def _parked(job: Job, links: Links) -> dict[str, Any]:
    """Until when a draft rests, and what there is to look at."""
    assert job.expires_at is not None and job.result is not None
    return {
        "progress": {"parked": True, "until": utc(job.expires_at)},
        "images": _images(job, links),
        "finish_url": f"{links.job(job.id)['response_url']}/finish",
    }


def steps_done(job: Job) -> dict[str, int]:
    """Denoising steps made and to make; the pictures of a job advance together."""
    steps, total = job.params.num_inference_steps, job.unet_calls
    last = job.draft.steps if job.draft and not job.draft.samples else steps
    return {
        "step": min(last, job.calls_done * last // total),
        "steps": steps,
        "unet_calls_done": job.calls_done,
        "unet_calls": total,
    }


def preview(made: Preview) -> dict[str, Any]:
    """A picture on its way; `call` is the UNet call after which it was made."""
    return {
        "content_type": "image/jpeg",
        "base64": base64.b64encode(made.jpeg).decode(),
        "call": made.call,
    }


def result(job: Job, links: Links, encoded: Sequence[bytes] = ()) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of the result endpoint; `encoded` are the pictures if base64."""
    if job.state is not State.COMPLETED:
        return status(job, links)
    assert job.result is not None
    images = _images(job, links)
    for entry, content in zip(images, encoded, strict=False):
        entry["base64"] = base64.b64encode(content).decode()
    return 200, {
        "status": State.COMPLETED,
        "request_id": job.id,
        "output": images[0]["url"],
        "images": images,
        "metrics": metrics(job),
        "timings": {"inference": job.result["inference_s"]},
        "seed": str(images[0]["seed"]),
        "prompt": job.params.prompt,
        **{name: job.result.get(name) for name in STAMP},
        **_reports(job),
    }


def _images(job: Job, links: Links) -> list[dict[str, Any]]:
    """The files of a job that is completed or rests."""
    assert job.result is not None
    return [
        {
            "url": links.file(job, image["name"]),
            "content_type": media_type(image["name"]),
            "file_name": image["name"],
            "file_size": image["bytes"],
            "width": image["width"],
            "height": image["height"],
            "seed": image["seed"],
            **({"receipt": image["receipt"]} if "receipt" in image else {}),
        }
        for image in job.result["images"]
    ]


def polled(job: Job, links: Links) -> tuple[int, dict[str, Any]]:
    """The older poll_url: the status body, with `output` when there is one."""
    code, body = status(job, links)
    if job.state is State.COMPLETED:
        body["output"] = result(job, links)[1]["output"]
    return code, body


def metrics(job: Job) -> dict[str, float]:
    """Seconds and dollars of a job that has ended; nothing before, no cost without a charge."""
    if not job.state.final or job.finished_at is None:
        return {}
    started = job.started_at or job.finished_at
    found = {
        "inference_time": round(job.finished_at - started, 6),
        "queue_time": round(started - job.created_at, 6),
        "total_time": round(job.finished_at - job.created_at, 6),
    }
    if job.state is State.COMPLETED and job.result:
        found["inference_time"] = job.result["inference_s"]
        found["cost"] = dollars(job.cost_micros)
        found["remaining_credits"] = dollars(job.remaining_micros or 0)
        if job.attempts > 1:
            found["retry_count"] = job.attempts - 1
    elif job.remaining_micros is not None:
        found["cost"] = dollars(job.cost_micros)
    return found


def checked(job: Job) -> dict[str, str]:
    """Whether the operator's checker has looked at the job's pictures, once there were some.

    The header is a list: the server names the rules for prompts on every answer, and this is one
    more entry.
    """
    if job.state is State.COMPLETED and job.result and "checked" in job.result:
        return {"x-safety": f"image-checker={'on' if job.result['checked'] else 'off'}"}
    if job.state is State.FAILED and job.started_at is not None and job.reason in CHECKS:
        return {"x-safety": f"image-checker={CHECKS[job.reason]}"}
    return {}


def picture(job: Job, links: Links, files: Sequence[bytes]) -> Response:
    """The answer of v1: the first picture's bytes, or JSON with all when base64 was asked."""
    assert job.result is not None
    headers = v1_headers(job, links)
    if not job.params.base64:
        kind = media_type(job.result["images"][0]["name"])
        return Response(files[0], media_type=kind, headers=headers)
    texts = [base64.b64encode(content).decode() for content in files]
    body = {
        "image": texts[0] if len(texts) == 1 else texts,
        "status": "Success",
        "infer_time": job.result["inference_s"],
        "seed": job.params.seed,
        "request_id": job.id,
        **{name: job.result.get(name) for name in STAMP},
        **_reports(job),
    }
    return JSONResponse(body, headers=headers)


def _reports(job: Job) -> dict[str, Any]:
    """How the prompts were read, if that was asked for."""
    return {"prompts": job.result["prompts"]} if job.result and "prompts" in job.result else {}


def v1_headers(job: Job, links: Links) -> dict[str, str]:
    assert job.result is not None
    images = job.result["images"]
    shape = {name: images[0][name] for name in ("width", "height", "seed")}
    return {
        **checked(job),
        "x-request-id": job.id,
        "x-cost": f"{dollars(job.cost_micros):.6f}",
        "x-remaining-credits": f"{dollars(job.remaining_micros or 0):.6f}",
        "x-generation-time": f"{job.result['inference_s']:.3f}",
        "x-seed-value": str(images[0]["seed"]),
        "x-output-metadata": json.dumps({**shape, "images": len(images)}),
        "x-output-urls": " ".join(links.file(job, image["name"]) for image in images),
        **{
            f"x-{name}": quote(str(job.result[name]), safe=" ()[]+,")  # headers are latin-1
            for name in STAMP
            if name in job.result  # results of before have no dtype
        },
    }


def failed(job: Job, links: Links) -> Response:
    code, body = status(job, links)
    return JSONResponse(body, code, headers={"x-request-id": job.id, **checked(job)})


def wire_state(job: Job) -> State:
    """The original knows four states: a cancelled job shows as FAILED with its reason, a parked one
    as PROCESSING.
    """
    return WIRE.get(job.state, job.state)
