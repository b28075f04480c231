"""Who may call a route: everyone, the holder of a key, or the owner of the job in its path.

Every endpoint is made by one of three decorators, and `route` refuses any that is not; a path
with a job in it takes owned endpoints only, and any other parameter of a path needs a reason in
HARMLESS. The board has no way to read a job without a key.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from starlette.endpoints import HTTPEndpoint
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route

from imaged.gateway.state import Gateway
from imaged.jobs import Job
from imaged.store.keys import Key

Endpoint = Callable[[Request], Awaitable[Response]]
JOB = "job_id"
#: Paths with parameters that are no job, and why anyone, or any key, may fill them in.
HARMLESS = {
    "/v1/{slug}": "a model, that the key may use or not",
    "/v2/{slug}": "a model, that the key may use or not",
    "/v2/{slug}/preflight": "a model, that the key may use or not",
    "/openai/v1/models/{slug}": "a model, that the key may use or not",
    "/files/{name}": "the link is signed",
    "/inference-request/request-history/{request_id}": "looked up among the key's own requests",
}
VERBS = ("get", "post", "put", "patch", "delete")


def public(handler: Endpoint) -> Endpoint:
    """Anyone may call."""
    return _marked(handler, "public")


def keyed(handler: Callable[[Request, Gateway, Key], Awaitable[Response]]) -> Endpoint:
    """The holder of a valid key may call; the handler is told which key."""

    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        gateway = Gateway.of(request)
        return await handler(request, gateway, await holder(request, gateway))

    return _marked(endpoint, "key")


def owned(handler: Callable[[Request, Gateway, Job], Awaitable[Response]]) -> Endpoint:
    """The owner of the job in the path may call; to others it is as unknown as none."""

    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        gateway = Gateway.of(request)
        return await handler(request, gateway, await own_job(request, gateway))

    return _marked(endpoint, "owner")


async def holder(request: HTTPConnection, gateway: Gateway) -> Key:
    """The key that this request shows; raises KeyMissing or KeyInvalid."""
    return await gateway.admission.key(presented(request))


async def own_job(request: HTTPConnection, gateway: Gateway) -> Job:
    """The job in the path if this request's key owns it; raises UnknownRequest."""
    key = await holder(request, gateway)
    return await gateway.board.job(key, request.path_params[JOB])


def presented(request: HTTPConnection) -> str | None:
    """The key as its dialect sends it: x-api-key, for OpenAI's clients a bearer token, for
    A1111's the password of basic authentication. Never a query parameter.
    """
    if header := request.headers.get("x-api-key"):
        return header
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    path = request.url.path
    if path.startswith("/openai/") and scheme.lower() == "bearer":
        return value.strip()
    if path.startswith("/sdapi/") and scheme.lower() == "basic":
        return _password(value)
    return None


def route(path: str, endpoint: Any, methods: list[str] | None = None) -> Route:
    """A route whose endpoint says who may call it; anything else is an error at import."""
    made = Route(path, endpoint, methods=methods)
    parameters = set(made.param_convertors)
    if parameters - {JOB} and path not in HARMLESS:
        raise TypeError(f"{path}: name its job {JOB}, or say in HARMLESS why it is nobody's")
    for mark in marks(endpoint):
        if mark is None or (JOB in parameters) != (mark == "owner"):
            raise TypeError(f"{path}: make its endpoint by public, keyed or owned")
    return made


def marks(endpoint: Any) -> list[str | None]:
    """Who may call, of a function or of each method of an HTTPEndpoint class."""
    if isinstance(endpoint, type) and issubclass(endpoint, HTTPEndpoint):
        verbs = [getattr(endpoint, verb) for verb in VERBS if hasattr(endpoint, verb)]
    else:
        verbs = [endpoint]
    return [getattr(verb, "access", None) for verb in verbs]


def _marked(endpoint: Endpoint, access: str) -> Endpoint:
    endpoint.access = access  # type: ignore[attr-defined]
    return endpoint


def _password(value: str) -> str | None:
    try:
        user, _, password = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return password or user
