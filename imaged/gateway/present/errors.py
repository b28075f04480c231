"""Errors as answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from imaged.errors import ImagedError
from imaged.gateway.present.headers import error_headers


def error_response(problem: ImagedError, headers: Mapping[str, str] | None = None) -> Response:
    """`{"error": text, "code": word}` under the error's status."""
    extra = {**(headers or {}), **error_headers(problem)}
    return JSONResponse(error_body(problem), problem.status or 500, headers=extra)


def error_body(problem: ImagedError) -> dict[str, Any]:
    return {"error": problem.detail, "code": problem.code}
