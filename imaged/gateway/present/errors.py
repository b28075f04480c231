"""Errors as answers."""

from __future__ import annotations

from collections.abc import Mapping

from imaged.errors import ImagedError
from imaged.gateway.present.answer import Answer, Body
from imaged.gateway.present.headers import error_headers


class Error(Body):
    """What went wrong, for people and for machines."""

    error: str
    code: str


def error_response(problem: ImagedError, headers: Mapping[str, str] | None = None) -> Answer[Error]:
    """Error under the problem's status."""
    extra = {**(headers or {}), **error_headers(problem)}
    return Answer(error_body(problem), problem.status or 500, extra)


def error_body(problem: ImagedError) -> Error:
    return Error(problem.detail, problem.code)
