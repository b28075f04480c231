"""What is answered about jobs: bodies, v1's headers, and the answers of submits. No I/O.

Pictures in base64 are megabytes of text: answers that may hold them are made in a thread.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal
from urllib.parse import quote

from msgspec import Meta
from starlette.responses import Response

from imaged.gateway.present.answer import UNSET, Answer, Body, UnsetType
from imaged.gateway.present.headers import safety_header
from imaged.gateway.present.links import Links, media_type
from imaged.gateway.present.units import dollars, utc
from imaged.jobs import Job, Preview, State
from imaged.params.knobs import KNOBS
from imaged.prompt.report import Reports
from imaged.provenance.receipts import FACTS

WireState = Literal["QUEUED", "PROCESSING", "COMPLETED", "FAILED"]
WIRE: dict[State, WireState] = {
    State.QUEUED: "QUEUED",
    State.PROCESSING: "PROCESSING",
    State.PARKED: "PROCESSING",
    State.COMPLETED: "COMPLETED",
    State.FAILED: "FAILED",
    State.CANCELLED: "FAILED",
}
#: Fields of a result that say what made it (worker/deliver.py), in answers and headers alike.
STAMP = ("checkpoint", "determinism", "engine", "device", "dtype")
_FACT_TYPES = {int: "integer", str: "string", dict: "object", bool: "boolean"}
#: A signed receipt; see provenance.receipts.
Receipt = Annotated[
    dict[str, Any],
    Meta(
        extra_json_schema={
            "required": [*FACTS, "key", "signature"],
            "properties": {
                **{name: {"type": _FACT_TYPES[kind]} for name, kind in FACTS.items()},
                **{name: {"type": "string"} for name in ("key", "signature")},
            },
        }
    ),
]
_JSON_TYPES = {"text": "string", "choice": "string", "loras": "array", "pair": "array"}
#: All parameters of a job by name, as the queue stores them.
Parameters = Annotated[
    dict[str, Any],
    Meta(
        extra_json_schema={
            "required": [one.name for one in KNOBS],
            "properties": {
                one.name: {
                    "type": _JSON_TYPES.get(one.kind, one.kind)
                    if one.default is not None
                    else [_JSON_TYPES.get(one.kind, one.kind), "null"]
                }
                for one in KNOBS
            },
            "additionalProperties": False,
        }
    ),
]


class Submitted(Body, kw_only=True):
    """A job that was queued, and where to ask for it."""

    request_id: str
    status: WireState
    poll_url: str
    status_url: str
    response_url: str
    warnings: list[str] | UnsetType = UNSET


class Metrics(Body):
    """Times in seconds and money in dollars of a job that has ended."""

    inference_time: float | UnsetType = UNSET
    queue_time: float | UnsetType = UNSET
    total_time: float | UnsetType = UNSET
    cost: float | UnsetType = UNSET
    remaining_credits: float | UnsetType = UNSET
    retry_count: int | UnsetType = UNSET


class Image(Body):
    """One picture of a job, and its signed link."""

    url: str
    content_type: str
    file_name: str
    file_size: int
    width: int
    height: int
    seed: int
    receipt: Receipt | UnsetType = UNSET
    base64: str | UnsetType = UNSET


class Parked(Body):
    """A draft that waits for its caller; it is cancelled at `until`."""

    parked: bool
    until: str


class PreviewBody(Body):
    """The newest preview of a job's first picture: a small JPEG, in base64.

    call: the UNet call after which it was made.
    """

    content_type: str
    base64: str
    call: int


class Steps(Body):
    """Steps and UNet calls, made and in all."""

    step: int
    steps: int
    unet_calls_done: int
    unet_calls: int


class JobBody(Body, kw_only=True):
    """State of a job, with its links: an error once it FAILED, how far it is while PROCESSING, the
    pictures of a draft that rests.
    """

    status: WireState
    request_id: str
    status_url: str
    response_url: str
    metrics: Metrics
    error: str | UnsetType = UNSET
    code: str | UnsetType = UNSET
    step: int | UnsetType = UNSET
    steps: int | UnsetType = UNSET
    unet_calls_done: int | UnsetType = UNSET
    unet_calls: int | UnsetType = UNSET
    progress: Parked | UnsetType = UNSET
    images: list[Image] | UnsetType = UNSET
    finish_url: str | UnsetType = UNSET
    preview: PreviewBody | UnsetType = UNSET
    output: str | UnsetType = UNSET


class Timings(Body):
    """How long the pictures took to make, in seconds."""

    inference: float


class Result(Body, kw_only=True):
    """A COMPLETED job: its pictures, and what made them."""

    status: Literal["COMPLETED"]
    request_id: str
    output: str
    images: list[Image]
    metrics: Metrics
    timings: Timings
    seed: str
    prompt: str
    checkpoint: str | None
    determinism: str | None
    engine: str | None
    device: str | None
    dtype: str | None
    prompts: Reports | UnsetType = UNSET


class PicturesInBase64(Body, kw_only=True):
    """The pictures of a job as text: one, or a list of several."""

    image: str | list[str]
    status: str
    infer_time: float
    seed: int
    request_id: str
    checkpoint: str | None
    determinism: str | None
    engine: str | None
    device: str | None
    dtype: str | None
    prompts: Reports | UnsetType = UNSET


def submitted(job_id: str, links: Links, warnings: Sequence[str]) -> Answer[Submitted]:
    of_job = links.job(job_id)
    body = Submitted(
        request_id=job_id,
        status="QUEUED",
        poll_url=of_job["poll_url"],
        status_url=of_job["status_url"],
        response_url=of_job["response_url"],
        warnings=list(warnings) or UNSET,
    )
    return Answer(body, headers={"x-request-id": job_id})


def status(job: Job, links: Links) -> tuple[int, JobBody]:
    """HTTP status and body of the status route."""
    state, of_job = wire_state(job), links.job(job.id)
    body = JobBody(
        status=state,
        request_id=job.id,
        status_url=of_job["status_url"],
        response_url=of_job["response_url"],
        metrics=metrics(job),
    )
    if state == "FAILED":
        body.error, body.code = job.error or "", job.reason or ""
        return 422, body
    if state == "PROCESSING":
        made = steps_done(job)
        body.step, body.steps = made.step, made.steps
        body.unet_calls_done, body.unet_calls = made.unet_calls_done, made.unet_calls
    if job.state is State.PARKED:
        assert job.expires_at is not None
        body.progress = Parked(True, utc(job.expires_at))
        body.images = _images(job, links)
        body.finish_url = f"{body.response_url}/finish"
    return 200, body


def steps_done(job: Job) -> Steps:
    steps, total = job.params.num_inference_steps, job.unet_calls
    last = job.draft.steps if job.draft and not job.draft.samples else steps
    return Steps(min(last, job.calls_done * last // total), steps, job.calls_done, total)


def preview(made: Preview) -> PreviewBody:
    return PreviewBody("image/jpeg", base64.b64encode(made.jpeg).decode(), made.call)


def is_completed(job: Job) -> bool:
    return job.state is State.COMPLETED


def completed(job: Job, links: Links, encoded: Sequence[bytes] = ()) -> Result:
    """Of a COMPLETED job."""
    assert job.result is not None
    images = _images(job, links)
    for entry, content in zip(images, encoded, strict=False):
        entry.base64 = base64.b64encode(content).decode()
    return Result(
        status="COMPLETED",
        request_id=job.id,
        output=images[0].url,
        images=images,
        metrics=metrics(job),
        timings=Timings(job.result["inference_s"]),
        seed=str(images[0].seed),
        prompt=job.params.prompt,
        **_stamp(job),
        prompts=job.result.get("prompts", UNSET),
    )


def _images(job: Job, links: Links) -> list[Image]:
    """Images of a completed or parked job."""
    assert job.result is not None
    return [
        Image(
            links.file(job, image["name"]),
            media_type(image["name"]),
            image["name"],
            image["bytes"],
            image["width"],
            image["height"],
            image["seed"],
            image.get("receipt", UNSET),
        )
        for image in job.result["images"]
    ]


def _stamp(job: Job) -> dict[str, Any]:
    assert job.result is not None
    return {name: job.result.get(name) for name in STAMP}


def polled(job: Job, links: Links) -> tuple[int, JobBody]:
    """HTTP status and body of the older poll_url: status, and `output` once completed."""
    code, body = status(job, links)
    if is_completed(job):
        body.output = completed(job, links).output
    return code, body


def metrics(job: Job) -> Metrics:
    """Times in seconds and cost in dollars of an ended job; empty before."""
    if not job.state.final or job.finished_at is None:
        return Metrics()
    started = job.started_at or job.finished_at
    waited = durations(job.created_at, started, job.finished_at)
    found = Metrics(
        inference_time=round(job.finished_at - started, 6),
        queue_time=waited["queue_time"],
        total_time=waited["total_time"],
    )
    if job.state is State.COMPLETED and job.result:
        found.inference_time = job.result["inference_s"]
        found.cost = dollars(job.cost_micros)
        found.remaining_credits = dollars(job.remaining_micros or 0)
        if job.attempts > 1:
            found.retry_count = job.attempts - 1
    elif job.remaining_micros is not None:
        found.cost = dollars(job.cost_micros)
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
    body = PicturesInBase64(
        image=texts[0] if len(texts) == 1 else texts,
        status="Success",
        infer_time=job.result["inference_s"],
        seed=job.params.seed,
        request_id=job.id,
        **_stamp(job),
        prompts=job.result.get("prompts", UNSET),
    )
    return Answer(body, headers=headers)


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


def failed(job: Job, links: Links) -> Answer[JobBody]:
    code, body = status(job, links)
    return Answer(body, code, {"x-request-id": job.id, **safety_header(job)})


def wire_state(job: Job) -> WireState:
    """The state in the original's four: CANCELLED shows as FAILED, PARKED as PROCESSING."""
    return WIRE[job.state]
