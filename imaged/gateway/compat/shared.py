"""Shared by the dialects: the form of errors, refusing fields by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from imaged.errors import BadParameter, ImagedError
from imaged.gateway.auth import Endpoint, Handler, keyed


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

        endpoint.error = answer  # type: ignore[attr-defined]  # for the OpenAPI document
        return endpoint

    return decorate


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
