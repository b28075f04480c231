"""What an answer looks like: jobs and errors to bodies and headers. No I/O.

Pictures in base64 are megabytes of text: answers that may hold them are made in a thread.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from starlette.responses import JSONResponse, Response

from imaged.gateway.present.headers import safety_header
from imaged.gateway.present.links import Links, media_type
from imaged.gateway.present.units import dollars, utc
from imaged.jobs import Job, Preview, State

#: Fields of a result that name what made it (worker/deliver.py).
STAMP = ("checkpoint", "determinism", "engine", "device", "dtype")
WIRE = {State.CANCELLED: State.FAILED, State.PARKED: State.PROCESSING}


def submitted(job_id: str, links: Links, warnings: Sequence[str]) -> Response:
    body: dict[str, Any] = {"request_id": job_id, "status": State.QUEUED, **links.job(job_id)}
    body |= {"warnings": list(warnings)} if warnings else {}
    return JSONResponse(body, headers={"x-request-id": job_id})


def status(job: Job, links: Links) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of the status route."""
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
    """Fields of a parked draft: until when, its images, where to finish it."""
    assert job.expires_at is not None and job.result is not None
    return {
        "progress": {"parked": True, "until": utc(job.expires_at)},
        "images": _images(job, links),
        "finish_url": f"{links.job(job.id)['response_url']}/finish",
    }


def steps_done(job: Job) -> dict[str, int]:
    """Steps and UNet calls, made and in all."""
    steps, total = job.params.num_inference_steps, job.unet_calls
    last = job.draft.steps if job.draft and not job.draft.samples else steps
    return {
        "step": min(last, job.calls_done * last // total),
        "steps": steps,
        "unet_calls_done": job.calls_done,
        "unet_calls": total,
    }


def preview(made: Preview) -> dict[str, Any]:
    """A preview in base64; call: the UNet call after which it was made."""
    return {
        "content_type": "image/jpeg",
        "base64": base64.b64encode(made.jpeg).decode(),
        "call": made.call,
    }


def result(job: Job, links: Links, encoded: Sequence[bytes] = ()) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of the result route; encoded: image files, if base64 was asked for."""
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
    """Image entries of a completed or parked job."""
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
    """HTTP status and body of the older poll_url: status, and `output` once completed."""
    code, body = status(job, links)
    if job.state is State.COMPLETED:
        body["output"] = result(job, links)[1]["output"]
    return code, body


def metrics(job: Job) -> dict[str, float]:
    """Times in seconds and cost in dollars of an ended job; empty before."""
    if not job.state.final or job.finished_at is None:
        return {}
    started = job.started_at or job.finished_at
    waited = durations(job.created_at, started, job.finished_at)
    found = {"inference_time": round(job.finished_at - started, 6), **waited}
    if job.state is State.COMPLETED and job.result:
        found["inference_time"] = job.result["inference_s"]
        found["cost"] = dollars(job.cost_micros)
        found["remaining_credits"] = dollars(job.remaining_micros or 0)
        if job.attempts > 1:
            found["retry_count"] = job.attempts - 1
    elif job.remaining_micros is not None:
        found["cost"] = dollars(job.cost_micros)
    return found


def durations(created_at: float, started_at: float, finished_at: float) -> dict[str, float]:
    """Seconds from submit to start, and to the end."""
    return {
        "queue_time": round(started_at - created_at, 6),
        "total_time": round(finished_at - created_at, 6),
    }


def picture(job: Job, links: Links, files: Sequence[bytes]) -> Response:
    """The answer of v1: the first image file, or JSON with all in base64."""
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
    """The prompt reports, if they were asked for."""
    return {"prompts": job.result["prompts"]} if job.result and "prompts" in job.result else {}


def v1_headers(job: Job, links: Links) -> dict[str, str]:
    assert job.result is not None
    images = job.result["images"]
    shape = {name: images[0][name] for name in ("width", "height", "seed")}
    return {
        **safety_header(job),
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
    return JSONResponse(body, code, headers={"x-request-id": job.id, **safety_header(job)})


def wire_state(job: Job) -> State:
    """The state in the original's four: CANCELLED shows as FAILED, PARKED as PROCESSING."""
    return WIRE.get(job.state, job.state)
