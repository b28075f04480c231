"""Answers with a JSON body: one structure, from which come the bytes and the OpenAPI document.

A handler's return annotation, `Answer[Body]`, is what the document says of its route.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

__all__ = ["UNSET", "Answer", "Body", "UnsetType"]


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """A JSON object without other fields. One that is UNSET is left out."""


B = TypeVar("B")


class Answer(Response, Generic[B]):
    """A JSON answer. Encoding takes long where pictures are in it: make it in a thread then."""

    media_type = "application/json"

    def __init__(
        self, body: B, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(msgspec.json.encode(body), status, headers)
