"""Request bodies: a JSON object or a form, as a dictionary."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from imaged.errors import BadParameter, MalformedBody, WrongContentType
from imaged.params.knobs import KNOBS

MAX_FORM_FIELDS = 100
logging.getLogger("python_multipart").setLevel(logging.ERROR)  # clients' broken forms


async def read(request: Request) -> Mapping[str, Any]:
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
