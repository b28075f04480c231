"""OpenAI's images endpoint on the same jobs: `base_url=".../openai/v1"`, a bearer key."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from imaged.catalogue.model import DEFAULT_SLUG, Model
from imaged.errors import (
    BadParameter,
    IdempotencyMismatch,
    ImagedError,
    NoCredits,
    StillRunning,
    UnknownModel,
)
from imaged.gateway.compat import shared
from imaged.gateway.context import Gateway
from imaged.gateway.present.answer import UNSET, Answer, Body, UnsetType
from imaged.gateway.present.answer_format import AnswerFormat
from imaged.gateway.present.headers import error_headers, safety_header
from imaged.gateway.present.links import Links
from imaged.gateway.submit.submission import Asked, read_object, read_submission
from imaged.gateway.submit_and_wait import submit_and_wait
from imaged.jobs import Job
from imaged.store.accounts.keys import Key

SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
OURS = ("negative_prompt", "num_inference_steps", "guidance_scale", "seed", "scheduler")
#: Fields that are not supported, with the values that are accepted because they do nothing.
UNSUPPORTED_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "background": ("auto", "opaque"),
    "stream": (False,),
    "partial_images": (0,),
    "output_compression": (100,),
}
NAMES = {"samples": "n", "img_width": "size", "img_height": "size"}
QUALITIES = ("auto", "standard", "hd", "low", "medium", "high")
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Problem(Body):
    """What went wrong; param: the field that is to blame."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(Body):
    """An error in OpenAI's form."""

    error: Problem


EITHER = {"anyOf": [{"required": ["url"]}, {"required": ["b64_json"]}]}


class Generated(Body):
    """One picture: a link, or its file in base64."""

    url: str | UnsetType = UNSET
    b64_json: str | UnsetType = UNSET


class Generations(Body):
    """Pictures; created: seconds since 1970."""

    created: int
    data: list[Annotated[Generated, Meta(extra_json_schema=EITHER)]]
    output_format: str
    size: str
    request_id: str
    seed: int


class OpenAIModel(Body):
    """A slug that may be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class OpenAIModels(Body):
    object: Literal["list"]
    data: list[OpenAIModel]


def _error(problem: ImagedError) -> Answer[OpenAIError]:
    """In OpenAI's form; x-should-retry: false where a retry cannot help."""
    status = problem.status or 500
    kind, code = TYPES.get(status, "invalid_request_error"), problem.code
    if isinstance(problem, NoCredits):
        status, kind, code = 429, "insufficient_quota", "insufficient_quota"
    elif isinstance(problem, UnknownModel):
        code = "model_not_found"
    elif status >= 500:
        kind = "server_error"
    field = problem.field if isinstance(problem, BadParameter) else None
    body = OpenAIError(Problem(problem.detail, kind, field, code))
    answer = Answer(body, status, error_headers(problem))
    if isinstance(problem, StillRunning | NoCredits | IdempotencyMismatch):
        answer.headers["x-should-retry"] = "false"
    return answer


route = shared.dialect(_error)


@route
async def generations(
    request: Request, gateway: Gateway, key: Key
) -> Answer[Generations] | Response:
    """POST /openai/v1/images/generations: pictures from a prompt."""
    given = await read_object(request)
    answer_with = _one_of(given, "response_format", ("url", "b64_json"))
    _one_of(given, "quality", QUALITIES)
    shared.refuse_unless(given, UNSUPPORTED_FIELDS)
    slug = shared.text(given, "model") or DEFAULT_SLUG
    model = await gateway.admission.model(slug, key)
    asked = Asked(model, _params(given), names=NAMES, wide=True)
    submission = read_submission(gateway.secret, key.id, request.headers, asked)
    how = AnswerFormat(partial(_answer, answer_with), _error)
    return await submit_and_wait(request, gateway, key, submission, how)


@route
async def list_models(_: Request, gateway: Gateway, key: Key) -> Answer[OpenAIModels]:
    """GET /openai/v1/models: the slugs that this key may ask for."""
    mine = [_model(*pair) for pair in (await gateway.admission.models(key)).items()]
    return Answer(OpenAIModels("list", mine))


@route
async def one_model(request: Request, gateway: Gateway, key: Key) -> Answer[OpenAIModel]:
    """GET /openai/v1/models/{slug}: one of them."""
    slug = request.path_params["slug"]
    return Answer(_model(slug, await gateway.admission.model(slug, key)))


def _params(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our parameters from theirs; bounds are checked later, under their names."""
    params = {name: given.get(name) for name in ("prompt", *OURS)}
    params["samples"] = given.get("n")
    params["output_format"] = _one_of(given, "output_format", ("png", "jpeg"))
    size = shared.text(given, "size") or "auto"
    if size != "auto":
        match = SIZE.fullmatch(size)
        if match is None:
            raise BadParameter("size", 'should be "auto" or WIDTHxHEIGHT, such as "1024x1024"')
        params["img_width"], params["img_height"] = int(match[1]), int(match[2])
    return params


def _answer(
    answer_with: str, job: Job, links: Links, files: Sequence[bytes]
) -> Answer[Generations]:
    assert job.result is not None and job.finished_at is not None
    images = job.result["images"]
    if answer_with == "b64_json":
        data = [Generated(b64_json=base64.b64encode(content).decode()) for content in files]
    else:
        data = [Generated(url=links.file(job, image["name"])) for image in images]
    body = Generations(
        int(job.finished_at),
        data,
        job.params.output_format,
        f"{job.params.img_width}x{job.params.img_height}",
        job.id,
        images[0]["seed"],
    )
    return Answer(body, headers=safety_header(job))


def _model(slug: str, model: Model) -> OpenAIModel:
    return OpenAIModel(slug, "model", 0, model.checkpoint_name)


def _one_of(given: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> str:
    """One of the allowed values, the first if absent; raises BadParameter."""
    value = given.get(name)
    if value is None:
        return allowed[0]
    if value not in allowed or not isinstance(value, str):
        raise BadParameter(name, "should be one of " + ", ".join(f'"{word}"' for word in allowed))
    return value
