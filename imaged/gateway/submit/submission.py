"""From a request, in whatever dialect, to one Submission: body, headers, parameters, quote,
draft.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from imaged.catalogue.aliases import widened
from imaged.catalogue.model import Model
from imaged.errors import BadParameter, MalformedBody, WrongContentType
from imaged.gateway.submit.quotes import QUOTE_ID, redeem
from imaged.jobs import Submission
from imaged.params.image_params import DEFAULTS, ImageParams, read_params, unknown_fields
from imaged.params.knobs import KNOBS, from_form
from imaged.store.signing import mac

IDEMPOTENCY_KEY, CANCEL_AFTER, DRAFT = "Idempotency-Key", "Cancel-After", "draft"
MAX_CANCEL_S = 86_400
MAX_FORM_FIELDS = 100
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
#: Fields that are always part of a fingerprint. Later ones are only where they differ from their
#: default, so that fingerprints of older requests stay the same.
ALWAYS_HASHED = frozenset(
    {
        *("prompt", "negative_prompt", "samples", "scheduler", "num_inference_steps", "seed"),
        *("guidance_scale", "img_width", "img_height", "base64", "output_format"),
    }
)
logging.getLogger("python_multipart").setLevel(logging.ERROR)  # clients' broken forms


@dataclass(frozen=True)
class Asked:
    """A request in our words: what a dialect makes of its own.

    fields:  by our names or their aliases, not yet checked.
    also:    which of `draft` and `quote_id` may be among the fields.
    accept:  the media types that the caller takes: PNG without JPEG chooses PNG, unless a quote
             says what is made.
    names:   our field -> the caller's, for refusals.
    wide:    with the engine's bounds rather than the original's.
    made_in: see Submission.
    """

    model: Model
    fields: Mapping[str, Any]
    also: frozenset[str] = frozenset()
    accept: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    wide: bool = False
    made_in: str | None = None


async def read_asked(request: Request, model: Model, *also: str) -> Asked:
    """What the body of a request to our own API asks for."""
    sent, accept = await read_body(request), request.headers.get("accept", "")
    return Asked(model, sent, frozenset(also), accept)


def read_submission(secret: bytes, key_id: int, headers: Headers, asked: Asked) -> Submission:
    """Read what was asked for, in one order for every dialect: headers, a quote or the parameters,
    draft. Raises BadParameter, which names the header or the caller's field.
    """
    model = asked.model
    idempotency_key = _idempotency_key(headers.getlist(IDEMPOTENCY_KEY))
    cancel_after_s = _cancel_after_s(headers.getlist(CANCEL_AFTER))
    if DRAFT not in asked.also and asked.fields.get(DRAFT) is not None:
        raise BadParameter(DRAFT, "is for POST /v2/{slug}; this path waits for finished pictures")
    quote = None
    if QUOTE_ID in asked.also and asked.fields.get(QUOTE_ID) is not None:
        quote = redeem(secret, asked.fields, key_id, model)
    params = quote.params if quote else _params(asked, model)
    submission = Submission(
        key_id,
        model,
        params,
        draft_steps=_draft(asked.fields, params.num_inference_steps),
        idempotency_key=idempotency_key,
        cancel_after_s=cancel_after_s,
        quoted_micros=quote.cost_micros if quote else None,
        quoted_until=quote.until if quote else math.inf,
        made_in=asked.made_in,
        warnings=tuple(_warnings(asked, model, params)),
    )
    if idempotency_key is None:
        return submission
    return replace(submission, fingerprint=fingerprint(secret, submission))


def fingerprint(secret: bytes, submission: Submission) -> str:
    """A keyed hash of the request, hex; a reader of the store learns nothing of the prompt. The
    seed counts as sent, so one of -1 is -1.
    """
    params = submission.params.as_dict()
    asked = {n: v for n, v in params.items() if n in ALWAYS_HASHED or v != DEFAULTS[n]}
    if submission.draft_steps:
        asked[DRAFT] = submission.draft_steps
    if submission.made_in:
        asked["made_in"] = submission.made_in
    text = json.dumps([submission.model.slug, asked], sort_keys=True)
    return mac(secret, b"fingerprint:" + text.encode()).hex()


def whole(value: Any, low: int, high: int) -> int | None:
    """A whole number between these, or None."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if number and low <= value <= high and value == int(value) else None


def _params(asked: Asked, model: Model) -> ImageParams:
    knobs = widened(model.knobs) if asked.wide else model.knobs
    try:
        params, _ = read_params(asked.fields, knobs)
    except BadParameter as problem:
        theirs = asked.names.get(problem.field, problem.field)
        text = problem.detail.removeprefix(problem.field).strip()
        raise BadParameter(theirs, text) from None
    if "image/png" in asked.accept and "image/jpeg" not in asked.accept and "*" not in asked.accept:
        params = replace(params, output_format="png")
    return params


def _warnings(asked: Asked, model: Model, params: ImageParams) -> Iterator[str]:
    """What of the request was ignored, or read differently."""
    for name in unknown_fields(asked.fields, model.knobs):
        if name not in asked.also:
            yield f"unknown field ignored: {name}"
    scheduler = asked.fields.get("scheduler")
    if scheduler is not None and scheduler != params.scheduler:
        yield f"scheduler was read as {params.scheduler}"


def _draft(fields: Mapping[str, Any], steps: int) -> int:
    """The step after which the job rests, of `steps`; 0 without a draft. The field is {"steps": N}
    or {"fraction": F}. Raises BadParameter.
    """
    given = fields.get(DRAFT)
    if given is None:
        return 0
    given = from_form(given)
    value = given.get("steps") if isinstance(given, Mapping) and len(given) == 1 else None
    if isinstance(given, Mapping) and set(given) == {"fraction"}:
        fraction = given["fraction"]
        if isinstance(fraction, float) and 0 < fraction < 1:
            value = min(max(1, round(fraction * steps)), steps - 1)
    if (found := whole(value, 1, steps - 1)) is None:
        raise BadParameter(
            DRAFT,
            f'should be {{"steps": N}} with a whole number between 1 and {steps - 1}, or '
            '{"fraction": F} with a number between 0 and 1',
        )
    return found


def _idempotency_key(given: list[str]) -> str | None:
    if not given:
        return None
    if len(given) > 1 or not _KEY.fullmatch(given[0]):
        raise BadParameter(
            IDEMPOTENCY_KEY, "should be given once, as 1 to 255 visible ASCII characters"
        )
    return given[0]


def _cancel_after_s(given: list[str]) -> float | None:
    if not given:
        return None
    seconds = float(given[0]) if len(given) == 1 and _SECONDS.fullmatch(given[0]) else 0.0
    if not 0 < seconds <= MAX_CANCEL_S:
        raise BadParameter(
            CANCEL_AFTER, f"should be given once, as seconds above 0 and up to {MAX_CANCEL_S}"
        )
    return seconds


# -- bodies -----------------------------------------------------------------------------------


async def read_body(request: Request) -> Mapping[str, Any]:
    """The body by its content type; raises WrongContentType, MalformedBody or BadParameter."""
    kind = _content_type(request)
    if kind == "multipart/form-data":
        return await _read_form(request)
    if kind != "application/json":
        raise WrongContentType()
    return read_json(await request.body())


async def read_object(request: Request) -> dict[str, Any]:
    """The body where only JSON is taken; raises WrongContentType, MalformedBody or BadParameter."""
    if _content_type(request) != "application/json":
        raise WrongContentType("Invalid content type: send application/json")
    return read_json(await request.body())


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def read_json(content: bytes) -> dict[str, Any]:
    """A JSON object. NaN and huge numbers become infinity, which is refused under its field
    later.
    """
    try:
        body = json.loads(content, parse_float=_float, parse_int=_int, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        raise MalformedBody() from None
    if not isinstance(body, dict):
        raise MalformedBody()
    return body


async def _read_form(request: Request) -> dict[str, Any]:
    """The text fields of a form; raises MalformedBody if it has files."""
    try:
        async with request.form(max_files=0, max_fields=MAX_FORM_FIELDS) as form:
            pairs = list(form.multi_items())
    except (HTTPException, MultiPartException, ValueError, LookupError):
        raise MalformedBody("The body must be a form with text fields only.") from None
    return _object(pairs)


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else math.inf


def _int(text: str) -> int | float:
    return int(text) if len(text) <= 400 else math.inf  # refused later, under its field's name


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object; raises BadParameter for a parameter that is given twice."""
    body = dict(pairs)
    if len(body) < len(pairs):
        names = [name for name, _ in pairs]
        for name in (n for knob in KNOBS for n in (knob.name, *knob.aliases)):
            if names.count(name) > 1:
                raise BadParameter(name, "should be given once, not twice")
    return body
