"""Authentication: a route is open to everyone, to a valid key, or to the owner of its job.

Every endpoint carries one of the decorators `public`, `keyed`, `owned`; `route` refuses any other.
A path with a job id takes owned endpoints only, and any other path parameter needs a reason in
UNOWNED_PATH_PARAMS. JobReader cannot read a job without a key.
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

from imaged.gateway.context import Gateway
from imaged.jobs import Job
from imaged.store.accounts.keys import Key

Endpoint = Callable[[Request], Awaitable[Response]]
Handler = Callable[[Request, Gateway, Key], Awaitable[Response]]
JOB = "job_id"
#: Paths with parameters other than a job id, and why no owner is needed.
UNOWNED_PATH_PARAMS = {
    "/v1/{slug}": "a model, that the key may use or not",
    "/v2/{slug}": "a model, that the key may use or not",
    "/v2/{slug}/preflight": "a model, that the key may use or not",
    "/openai/v1/models/{slug}": "a model, that the key may use or not",
    "/files/{name}": "the link is signed",
    "/inference-request/request-history/{request_id}": "looked up among the key's own requests",
}
VERBS = ("get", "post", "put", "patch", "delete")


def public(handler: Endpoint) -> Endpoint:
    """Mark a handler that needs no key."""
    return _marked(handler, "public")


def keyed(handler: Handler) -> Endpoint:
    """Wrap a handler that needs a valid key and is given it."""

    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        gateway = Gateway.of(request)
        return await handler(request, gateway, await authenticate(request, gateway))

    return _marked(endpoint, "key")


def owned(handler: Callable[[Request, Gateway, Job], Awaitable[Response]]) -> Endpoint:
    """Wrap a handler of the job in the path; 404 for the key of another."""

    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        gateway = Gateway.of(request)
        return await handler(request, gateway, await own_job(request, gateway))

    return _marked(endpoint, "owner")


async def authenticate(request: HTTPConnection, gateway: Gateway) -> Key:
    """The key of this request; raises KeyMissing or KeyInvalid."""
    return await gateway.admission.key(presented_key(request))


async def own_job(request: HTTPConnection, gateway: Gateway) -> Job:
    """The job in the path if this request's key owns it; raises UnknownRequest."""
    key = await authenticate(request, gateway)
    return await gateway.reader.job(key, request.path_params[JOB])


def presented_key(request: HTTPConnection) -> str | None:
    """The key as sent: x-api-key; under /openai/ a bearer token; under /sdapi/ the password of
    basic authentication. Never a query parameter, which would end up in logs.
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
    """A Starlette route; raises TypeError unless its endpoint says who may call it."""
    made = Route(path, endpoint, methods=methods)
    parameters = set(made.param_convertors)
    if parameters - {JOB} and path not in UNOWNED_PATH_PARAMS:
        raise TypeError(
            f"{path}: name its job {JOB}, or say in UNOWNED_PATH_PARAMS why it has no owner"
        )
    for mark in marks(endpoint):
        if mark is None or (JOB in parameters) != (mark == "owner"):
            raise TypeError(f"{path}: make its endpoint by public, keyed or owned")
    return made


def marks(endpoint: Any) -> list[str | None]:
    """ "public", "key" or "owner" of a function, or of each method of an HTTPEndpoint class."""
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
