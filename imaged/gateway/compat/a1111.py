"""The A1111 web UI's API on the same jobs: txt2img, and what its clients ask around it.

The key travels as `x-api-key` or as the password of basic authentication. What would change the
picture and cannot be done here is refused by its name; what is only housekeeping is ignored.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from imaged.catalogue.model import DEFAULT_SLUG
from imaged.errors import BadParameter, ImagedError
from imaged.gateway.compat import shared
from imaged.gateway.context import Gateway
from imaged.gateway.present.answer import Answer, Body
from imaged.gateway.present.answer_format import AnswerFormat
from imaged.gateway.present.bodies import Parameters
from imaged.gateway.present.headers import error_headers, safety_header
from imaged.gateway.present.links import Links
from imaged.gateway.submit.submission import Asked, read_object, read_submission
from imaged.gateway.submit_and_wait import submit_and_wait
from imaged.jobs import Job
from imaged.provenance.infotext import A1111_NAMES, infotext
from imaged.sampling.schedulers import SCHEDULERS
from imaged.store.accounts.keys import Key
from imaged.store.jobs import queue

ANCESTRAL = ("Euler a", "DPM2 a Karras")
PLAIN = ("uniform", "normal")
#: A1111's sampler name, lower case -> our scheduler by schedule name.
SAMPLERS: Mapping[str, Mapping[str, str]] = {
    **{name.lower(): {"automatic": name} for name in SCHEDULERS},
    "dpm++ 2m": {
        "automatic": "DPM++ 2M Karras",
        "karras": "DPM++ 2M Karras",
        **dict.fromkeys(PLAIN, "DPM Multi"),
    },
    "dpm2": {"automatic": "DPM2 Karras", "karras": "DPM2 Karras"},
    "dpm2 a": {"automatic": "DPM2 a Karras", "karras": "DPM2 a Karras"},
    "plms": {"automatic": "PNDM"},
    **{
        name.lower(): {"automatic": name, **dict.fromkeys(PLAIN, name)}
        for name in ("Euler", "Euler a", "Heun", "LMS")
    },
    **{
        name.lower(): {"automatic": name, "karras": name} for name in SCHEDULERS if "Karras" in name
    },
}
OFFERED = ("DPM++ 2M", "Euler a", "Euler", "LMS", "Heun", "DPM2", "DPM2 a", "DDIM", "PLMS", "UniPC")
#: Fields that are not supported, with the values that are accepted because they do nothing.
UNSUPPORTED_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "enable_hr": (False,),
    "init_images": ([],),
    "restore_faces": (False,),
    "tiling": (False,),
    "styles": ([],),
    "subseed_strength": (0,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "script_name": ("",),
    "refiner_checkpoint": ("", "None"),
    "s_churn": (0,),
    "s_tmin": (0,),
    "s_tmax": (0,),
    "s_noise": (1,),
    "firstpass_image": ("",),
}


class A1111Error(Body):
    """An error in the web UI's form: its clients look in different fields."""

    error: str
    detail: str
    body: str
    errors: str
    code: str


class Txt2Img(Body):
    """Pictures in base64; info: JSON, as text."""

    images: list[str]
    parameters: Parameters
    info: str


class Info(Body):
    """What the web UI tells of its pictures."""

    prompt: str
    all_prompts: list[str]
    negative_prompt: str
    seed: int
    all_seeds: list[int]
    width: int
    height: int
    sampler_name: str
    cfg_scale: float
    steps: int
    batch_size: int
    sd_model_name: str
    infotexts: list[str]
    job_timestamp: str
    request_id: str


class Sampler(Body):
    name: str
    aliases: list[str]
    options: dict[str, str]


class Schedule(Body):
    name: str
    label: str


class Scripts(Body):
    txt2img: list[str]
    img2img: list[str]


class SdModel(Body):
    title: str
    model_name: str
    hash: str | None
    sha256: str | None
    filename: str
    config: str | None


class LoraFile(Body):
    name: str
    alias: str
    path: str
    metadata: dict[str, str]


class Options(Body):
    sd_model_checkpoint: str
    samples_format: str


class JobProgress(Body):
    skipped: bool
    interrupted: bool
    job: str
    job_count: int
    job_no: int
    job_timestamp: str
    sampling_step: int
    sampling_steps: int


class Progress(Body):
    """How far the oldest open job is; progress: from 0 to 1."""

    progress: float
    eta_relative: float
    state: JobProgress
    current_image: str | None
    textinfo: str | None


def _error(problem: ImagedError) -> Answer[A1111Error]:
    text = problem.detail
    body = A1111Error(text, text, "", text, problem.code)
    return Answer(body, problem.status or 500, error_headers(problem))


route = shared.dialect(_error)


@route
async def txt2img(request: Request, gateway: Gateway, key: Key) -> Answer[Txt2Img] | Response:
    """POST /sdapi/v1/txt2img: pictures from a prompt, as PNG with infotext."""
    given = await read_object(request)
    shared.refuse_unless(given, UNSUPPORTED_FIELDS)
    _no_scripts(given)
    model = await gateway.admission.model(_slug(given), key)
    asked = Asked(model, _params(given), names={"guidance": "cfg_scale"}, wide=True)
    submission = read_submission(gateway.secret, key.id, request.headers, asked)
    shown = given.get("send_images", True) is not False
    how = AnswerFormat(partial(_answer, shown), _error)
    return await submit_and_wait(request, gateway, key, submission, how)


@route
async def samplers(_: Request, gateway: Gateway, key: Key) -> Answer[list[Sampler]]:
    """GET /sdapi/v1/samplers: A1111's names of the samplers that are the same here."""
    return Answer([Sampler(name, [], {}) for name in OFFERED])


@route
async def schedulers(_: Request, gateway: Gateway, key: Key) -> Answer[list[Schedule]]:
    """GET /sdapi/v1/schedulers: the named schedules."""
    return Answer([Schedule(name, name.title()) for name in ("automatic", "karras", "uniform")])


@route
async def scripts(_: Request, gateway: Gateway, key: Key) -> Answer[Scripts]:
    """GET /sdapi/v1/scripts: there are none."""
    return Answer(Scripts([], []))


@route
async def sd_models(_: Request, gateway: Gateway, key: Key) -> Answer[list[SdModel]]:
    """GET /sdapi/v1/sd-models: what this key may ask for; a title chooses by override_settings."""
    mine = await gateway.admission.models(key)
    return Answer(
        [SdModel(slug, slug, None, None, m.checkpoint_name, None) for slug, m in mine.items()]
    )


@route
async def loras(_: Request, gateway: Gateway, __: Key) -> Answer[list[LoraFile]]:
    """GET /sdapi/v1/loras: the LoRA files that a prompt may name as <lora:NAME:WEIGHT>."""
    names = await asyncio.to_thread(gateway.settings.lora_names)
    return Answer([LoraFile(name, name, "", {}) for name in names])


@route
async def options(_: Request, gateway: Gateway, key: Key) -> Answer[Options]:
    """GET /sdapi/v1/options: what a request gets that names no model."""
    return Answer(Options(DEFAULT_SLUG, "png"))


@route
async def progress(_: Request, gateway: Gateway, key: Key) -> Answer[Progress]:
    """GET /sdapi/v1/progress: how far this key's oldest open job is."""
    ids = await gateway.db.query(lambda c: queue.open_of(c, key.id))
    job = await gateway.reader.job(key, ids[0]) if ids else None
    steps = job.params.num_inference_steps if job else 0
    share = job.calls_done / job.unet_calls if job else 0.0
    state = JobProgress(
        skipped=False,
        interrupted=False,
        job=job.id if job else "",
        job_count=len(ids),
        job_no=0,
        job_timestamp=_stamp(job.created_at) if job else "0",
        sampling_step=int(share * steps),
        sampling_steps=steps,
    )
    return Answer(Progress(share, 0.0, state, None, None))


def _params(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our parameters from theirs, with their defaults."""
    scheduler = _sampler(given)
    eta = given.get("eta")
    usual = 1 if scheduler in ANCESTRAL else 0
    if scheduler in (*ANCESTRAL, "DDIM") and eta is not None and eta != usual:
        raise BadParameter("eta", f"should be {usual} with this sampler, or null")
    return {
        "prompt": given.get("prompt"),
        "negative_prompt": given.get("negative_prompt"),
        "scheduler": scheduler,
        "samples": _pictures(given),
        "steps": _or(given.get("steps"), 50),
        "guidance": _or(given.get("cfg_scale"), 7.0),
        "seed": given.get("seed"),
        "width": _or(given.get("width"), 512),
        "height": _or(given.get("height"), 512),
        "output_format": "png",
    }


def _or(value: Any, default: float) -> Any:
    return default if value is None else value


def _pictures(given: Mapping[str, Any]) -> int:
    """batch_size x n_iter; raises BadParameter above the limit of a job."""
    numbers = [_or(given.get(name), 1) for name in ("batch_size", "n_iter")]
    for name, number in zip(("batch_size", "n_iter"), numbers, strict=True):
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= 4:
            raise BadParameter(name, "should be an integer between 1 and 4")
    if numbers[0] * numbers[1] > 4:
        raise BadParameter("n_iter", "times batch_size should be at most 4")
    return int(numbers[0] * numbers[1])


def _sampler(given: Mapping[str, Any]) -> str:
    """Our scheduler for their sampler and schedule; raises BadParameter listing the names."""
    name = shared.text(given, "sampler_name") or shared.text(given, "sampler_index") or "Euler"
    schedule = (shared.text(given, "scheduler") or "automatic").lower()
    by_schedule = SAMPLERS.get(name.strip().lower())
    if by_schedule is None:
        raise BadParameter("sampler_name", "should be one of " + ", ".join(OFFERED))
    if schedule not in by_schedule:
        raise BadParameter("scheduler", "should be one of " + ", ".join(by_schedule))
    return by_schedule[schedule]


def _no_scripts(given: Mapping[str, Any]) -> None:
    """Raises BadParameter for scripts that are not switched off (args empty or [false])."""
    scripts = given.get("alwayson_scripts") or {}
    if not isinstance(scripts, dict):
        raise BadParameter("alwayson_scripts", "should be an object")
    for script in scripts.values():
        if not isinstance(script, dict) or script.get("args") not in (None, [], [False]):
            raise BadParameter("alwayson_scripts", "is not supported here: leave it out, or empty")


def _slug(given: Mapping[str, Any]) -> str:
    settings = given.get("override_settings") or {}
    if not isinstance(settings, dict) or set(settings) - {"sd_model_checkpoint"}:
        raise BadParameter("override_settings", "may hold sd_model_checkpoint and no other")
    return shared.text(settings, "sd_model_checkpoint") or DEFAULT_SLUG


def _answer(shown: bool, job: Job, _: Links, files: Sequence[bytes]) -> Answer[Txt2Img]:
    images = [base64.b64encode(content).decode() for content in files] if shown else []
    body = Txt2Img(images, job.params.as_dict(), msgspec.json.encode(_info(job)).decode())
    return Answer(body, headers=safety_header(job))


def _info(job: Job) -> Info:
    assert job.result is not None
    images, params = job.result["images"], job.params
    checkpoint = job.result["checkpoint"]
    return Info(
        prompt=params.prompt,
        all_prompts=[params.prompt] * len(images),
        negative_prompt=params.negative_prompt or "",
        seed=images[0]["seed"],
        all_seeds=[image["seed"] for image in images],
        width=params.img_width,
        height=params.img_height,
        sampler_name=A1111_NAMES.get(params.scheduler, params.scheduler),
        cfg_scale=params.guidance_scale,
        steps=params.num_inference_steps,
        batch_size=len(images),
        sd_model_name=checkpoint,
        infotexts=[infotext(params, image["seed"], checkpoint) for image in images],
        job_timestamp=_stamp(job.created_at),
        request_id=job.id,
    )


def _stamp(at: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(at))
