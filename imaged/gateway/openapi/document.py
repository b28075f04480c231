"""The OpenAPI document, made from routes, parameters and errors."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

import imaged
from imaged.errors import (
    BadParameter,
    BodyTooLarge,
    BodyTooSlow,
    IdempotencyMismatch,
    ImagedError,
    KeyInvalid,
    KeyMissing,
    MalformedBody,
    ModelForbidden,
    ModelRetired,
    NoCredits,
    NotParked,
    StillRunning,
    TooFast,
    TooManyWebhooks,
    Unavailable,
    UnknownModel,
    UnknownRequest,
    UnknownWebhook,
    WrongContentType,
)
from imaged.gateway.api.events import LIFE_S
from imaged.gateway.api.status import MAX_WAIT_S
from imaged.gateway.auth import VERBS, marks, owned, public
from imaged.gateway.compat import segmind
from imaged.gateway.openapi import schemas
from imaged.gateway.openapi.examples import EXAMPLES
from imaged.gateway.operations.health import Ready
from imaged.gateway.present.answer import Answer
from imaged.gateway.present.bodies import JobBody
from imaged.gateway.present.errors import Error, error_response
from imaged.gateway.submit.submission import CANCEL_AFTER, IDEMPOTENCY_KEY, MAX_CANCEL_S
from imaged.params.knobs import KNOBS, WIDEST
from imaged.sampling.schedulers import STEPS

STATUS = "/v2/requests/{job_id}/status"
EVENTS = "/v2/requests/{job_id}/events"
V1, V2, PREFLIGHT = "/v1/{slug}", "/v2/{slug}", "/v2/{slug}/preflight"
REPLAY, FINISH = "/v2/replay", "/v2/requests/{job_id}/finish"
TAKE_PICTURES, TAKE_QUOTES, TAKE_DRAFTS = (V1, V2, PREFLIGHT), (V1, V2), (V2, PREFLIGHT)
SUBMITS = (V1, V2, REPLAY, schemas.OPENAI, schemas.SDAPI)
ENDS_AS_JOB = (V1, REPLAY)
DIALECTS = (schemas.OPENAI, schemas.SDAPI)
MIN_STEPS, MAX_STEPS = WIDEST["num_inference_steps"]
#: Media types of answers that are neither JSON nor a file.
TEXT_TYPES = {EVENTS: "text/event-stream", "/metrics": "text/plain", "/docs": "text/html"}
#: Errors that are answered before a dialect has the request, in our own form.
OWN_FORM = (BodyTooSlow, BodyTooLarge, Unavailable)
_REF = "#/components/schemas/{name}"
ERROR = {"$ref": _REF.format(name=Error.__name__)}
ASK_FOR_A_MODEL = (*SUBMITS, PREFLIGHT, "/openai/v1/models/{slug}")
#: One of each error that a request can be answered with, as an example.
PROBLEMS: tuple[ImagedError, ...] = (
    MalformedBody(),
    BadParameter("num_inference_steps", "should be an integer between 20 and 100"),
    KeyMissing(),
    KeyInvalid(),
    ModelForbidden(),
    UnknownModel(),
    UnknownRequest(),
    UnknownWebhook(),
    WrongContentType(),
    NoCredits("Not enough credits: this job costs 0.008000 and 0.001000 are left"),
    BodyTooSlow(),
    IdempotencyMismatch(),
    NotParked(),
    TooManyWebhooks(),
    ModelRetired(),
    BodyTooLarge(),
    TooFast(2.5, 0.0),
    Unavailable(),
    StillRunning("0123456789abcdef0123456789abcdef"),
)
#: Errors that only these paths answer with.
ONLY_ON: Mapping[tuple[type[ImagedError], ...], tuple[str, ...]] = {
    (UnknownModel,): (*ASK_FOR_A_MODEL, FINISH, "/v1/schedulers"),
    (ModelForbidden, ModelRetired): ASK_FOR_A_MODEL,
    (UnknownWebhook,): ("/webhook/update", "/webhook/inactive", "/webhook/dispatch-logs"),
    (TooManyWebhooks,): ("/webhook/add",),
    (NotParked,): (FINISH,),
    (NoCredits, IdempotencyMismatch): SUBMITS,
    (TooFast,): (*SUBMITS, PREFLIGHT, FINISH),
    (StillRunning,): tuple(path for path in SUBMITS if path != V2),
}
FORMS = ("application/json", "multipart/form-data")
DAY = {"type": "string", "format": "date"}
#: Query parameters by path.
QUERIES: dict[str, dict[str, Any]] = {
    STATUS: {
        "wait": {"type": "number", "minimum": 0, "maximum": MAX_WAIT_S},
        "preview": {"enum": ["0", "1"]},
    },
    "/v1/schedulers": {
        "model": {"type": "string"},
        "profile": {"enum": list(STEPS)},
        "steps": {"type": "integer", "minimum": MIN_STEPS, "maximum": MAX_STEPS},
    },
    EVENTS: {"wait": {"type": "number", "minimum": 0, "maximum": LIFE_S}},
    "/webhook/inactive": {"webhook_id": {"type": "string"}},
    "/webhook/dispatch-logs": {"webhook_id": {"type": "string"}},
    "/files/{name}": {"exp": {"type": "string"}, "sig": {"type": "string"}},
    "/inference-request/recent-generations": {"model_name": {"type": "string"}},
    "/inference-request/generations": {
        "page": {"type": "integer", "minimum": 1},
        "model_name": {"type": "string"},
        "start_date": DAY,
        "end_date": DAY,
    },
    "/inference-request/request-history": {
        "page": {"type": "integer", "minimum": 1},
        "per_page": {"type": "integer", "minimum": 1, "maximum": 100},
        "from_date": DAY,
        "to_date": DAY,
        "model_name": {"type": "string"},
        "status": {"enum": list(segmind.STATES)},
        "sort_by": {"enum": list(segmind.ORDERS)},
        "sort_order": {"enum": ["asc", "desc"]},
    },
}


#: Request headers by path.
HEADERS: dict[str, dict[str, Any]] = {
    **{
        path: {
            IDEMPOTENCY_KEY: {"type": "string", "minLength": 1, "maxLength": 255},
            CANCEL_AFTER: {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_CANCEL_S},
        }
        for path in SUBMITS
    },
    EVENTS: {"Last-Event-ID": {"type": "string"}},
}


@dataclass(frozen=True)
class Described:
    """Document and page, made once."""

    document: bytes
    page: bytes

    @classmethod
    def of(cls, routes: Iterable[Any]) -> Described:
        made = document(routes)
        return cls(json.dumps(made).encode(), _page(made).encode())


@public
async def openapi(request: Request) -> Response:
    """GET /openapi.json: this API as an OpenAPI document."""
    return Response(request.app.state.described.document, media_type="application/json")


@public
async def page(request: Request) -> Response:
    """GET /docs: the same as a page to read."""
    return HTMLResponse(request.app.state.described.page)


def _page(made: Mapping[str, Any]) -> str:
    rows = [
        f"<tr><td>{verb.upper()}</td><td><code>{html.escape(path)}</code></td>"
        f"<td>{html.escape(operation['summary'])}</td></tr>"
        for path, operations in made["paths"].items()
        for verb, operation in operations.items()
    ]
    knobs = [
        f"<tr><td><code>{k.name}</code></td><td>{html.escape(k.allowed)}</td>"
        f"<td>{html.escape(str(k.default))}</td><td>{html.escape(k.text)}</td></tr>"
        for k in KNOBS
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>imaged</title>"
        "<style>body{font:16px sans-serif;margin:2em}td{padding:.2em 1em .2em 0}</style>"
        f"<h1>imaged</h1><p>As a document: <a href=/openapi.json>openapi.json</a></p>"
        f"<table>{''.join(rows)}</table><h2>Parameters of a picture</h2>"
        f"<table>{''.join(knobs)}</table></html>"
    )


def document(routes: Iterable[Any]) -> dict[str, Any]:
    """OpenAPI 3.1 of these routes and of the status poll, which is middleware."""
    found = [
        (route.path, verb, handler)
        for route in routes
        for verb, handler in _handlers(route)
        if _summary(handler)
    ]
    found.append((STATUS, "get", poll))
    handlers = [handler for _, _, handler in found]
    answered = dict.fromkeys(
        kind for one in (*handlers, *map(_error_of, handlers)) for kind in _bodies(one)
    )
    made, components = msgspec.json.schema_components(answered, ref_template=_REF)
    said = dict(zip(answered, made, strict=True))
    if shared := [name for name in components if "." in name or name == "Picture"]:
        raise TypeError(f"two bodies have one name: {', '.join(shared)}")
    paths: dict[str, dict[str, Any]] = {}
    for path, verb, handler in found:
        paths.setdefault(path, {})[verb] = _operation(path, verb, handler, said)
    return {
        "openapi": "3.1.0",
        "info": {"title": "imaged", "version": imaged.__version__},
        "servers": [{"url": "./", "description": "where this document is"}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic"},
            },
            "schemas": {
                **{name: _closed(kind) for name, kind in components.items()},
                "Picture": schemas.PICTURE,
            },
        },
    }


@owned
async def poll(*_: Any) -> Answer[JobBody]:
    """GET /v2/requests/{job_id}/status: How far a job is; with `wait`, once it ended."""
    raise NotImplementedError  # api.status answers before any route does


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Without other fields, so that one that is not described fails a test."""
    return {"additionalProperties": False, **schema} if "properties" in schema else schema


def _bodies(handler: Any) -> list[Any]:
    """The bodies of what a handler returns; see present.answer."""
    returned = get_type_hints(handler)["return"]
    kinds = get_args(returned) if get_origin(returned) in (Union, UnionType) else (returned,)
    return [get_args(kind)[0] for kind in kinds if get_origin(kind) is Answer]


def _error_of(handler: Any) -> Callable[[ImagedError], Response]:
    """What gives an error the form of the handler's dialect."""
    found: Callable[[ImagedError], Response] = getattr(handler, "error", error_response)
    return found


def _handlers(route: Route) -> Iterator[tuple[str, Any]]:
    if isinstance(route.endpoint, type):
        found = ((verb, getattr(route.endpoint, verb, None)) for verb in VERBS)
        yield from ((verb, handler) for verb, handler in found if handler is not None)
    else:
        assert marks(route.endpoint)
        verbs = sorted(verb.lower() for verb in (route.methods or set()) - {"HEAD"})
        yield from ((verb, route.endpoint) for verb in verbs)


def _summary(handler: Any) -> str:
    """The summary of an operation: its docstring after `GET /path: `."""
    first = (handler.__doc__ or "").strip().split("\n")[0]
    match = re.match(r"[A-Z]+ \S+ ?(.*)", first)
    return match[1] if match else ""


def _operation(path: str, verb: str, handler: Any, said: Mapping[Any, Any]) -> dict[str, Any]:
    """One verb of one path; said: the schemas of bodies."""
    mark = getattr(handler, "access", "public")
    dialect = {"openai": "bearer", "sdapi": "basic"}.get(path.split("/")[1])
    schemes = ["key", *([dialect] if dialect else [])]
    named = [(name, "path", {"type": "string"}) for name in re.findall(r"{(\w+)}", path)]
    named += [(name, "query", kind) for name, kind in QUERIES.get(path, {}).items()]
    named += [(name, "header", kind) for name, kind in HEADERS.get(path, {}).items()]
    operation: dict[str, Any] = {
        "summary": _summary(handler),
        "operationId": f"{verb}{re.sub(r'[^a-z0-9]+', '_', path.lower()).rstrip('_')}",
        "security": [] if mark == "public" else [{name: []} for name in schemes],
        "parameters": [
            {"name": name, "in": place, "required": place == "path", "schema": kind}
            for name, place, kind in named
        ],
        "responses": _responses(path, verb, handler, said),
    }
    if verb == "post":
        picture = {"$ref": "#/components/schemas/Picture"}
        body: dict[str, Any] = (
            {"anyOf": [picture, schemas.QUOTED]} if path in TAKE_QUOTES else picture
        )
        body = {"allOf": [body, schemas.DRAFTED]} if path in TAKE_DRAFTS else body
        body = body if path in TAKE_PICTURES else schemas.REQUESTS.get(path, {"type": "object"})
        kinds = FORMS if path in TAKE_PICTURES else FORMS[:1]
        example = {"example": EXAMPLES[path]} if path in EXAMPLES else {}
        operation["requestBody"] = {
            "required": True,
            "content": {kind: {"schema": body, **example} for kind in kinds},
        }
    return operation


def _responses(path: str, verb: str, handler: Any, said: Mapping[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "200": {"description": "It worked.", "content": _content(path, handler, said)}
    }
    form, mark = _error_of(handler), getattr(handler, "access", "public")
    error, job = said[_bodies(form)[0]], said[JobBody]
    for problem in PROBLEMS:
        if not _can_answer(problem, path, verb, mark):
            continue
        answer = (error_response if type(problem) in OWN_FORM else form)(problem)
        text = (type(problem).__doc__ or "").strip().split("\n")[0]
        schema = ERROR if type(problem) in OWN_FORM else error
        _add(found, answer, text, schema, problem.code)
    if path == EVENTS:
        found["204"] = {"description": "Last-Event-ID is the stream's last: there is no more."}
    if mark == "owner" or path in ENDS_AS_JOB:
        found["422"] = _json("The job ran and FAILED; the body is the job's.", job)
    elif path in DIALECTS:
        found["422"] = _json("The job ran and FAILED.", error)
    if path == "/readyz":
        found["503"] = _json("No worker holds a checkpoint.", said[Ready])
    found["default"] = _json("Refused, with the reason.", error)
    return dict(sorted(found.items()))


def _content(path: str, handler: Any, said: Mapping[Any, Any]) -> dict[str, Any]:
    """What is answered with 200, by media type."""
    if path in TEXT_TYPES:
        return {TEXT_TYPES[path]: {"schema": schemas.TEXT}}
    kinds = [said[kind] for kind in _bodies(handler)]
    schema = kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {}
    if path == "/openapi.json":
        schema = {"type": "object", "required": ["openapi", "paths"]}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if path in (V1, "/files/{name}"):
        binary = {"schema": {"type": "string", "contentEncoding": "binary"}}
        content |= {"image/jpeg": binary, "image/png": binary}
    return content


def _add(found: dict[str, Any], answer: Response, text: str, schema: Any, code: str) -> None:
    """One more error under its status, with the body that it has as an example."""
    entry = found.setdefault(str(answer.status_code), _json("", schema))
    entry["description"] = f"{entry['description']} {text.rstrip('.')}.".strip()
    content = entry["content"]["application/json"]
    if content["schema"] != schema:
        content["schema"] = {"anyOf": [content["schema"], schema]}
    example = {"value": json.loads(bytes(answer.body))}
    content.setdefault("examples", {})[code] = example


def _json(text: str, schema: Any) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _can_answer(problem: ImagedError, path: str, verb: str, mark: str) -> bool:
    """Whether an operation can answer with this error."""
    for kinds, paths in ONLY_ON.items():
        if isinstance(problem, kinds):
            return path in paths
    if isinstance(problem, KeyMissing | KeyInvalid):
        return mark != "public"
    if isinstance(problem, UnknownRequest):
        return mark == "owner" or "{request_id}" in path or path.startswith("/files/")
    if isinstance(problem, BadParameter):
        return verb == "post" or path in QUERIES
    return verb == "post" or isinstance(problem, Unavailable)
