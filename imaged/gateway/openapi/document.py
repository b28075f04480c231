"""The OpenAPI document, made from routes, parameters and errors."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

import imaged
from imaged.errors import ImagedError, Refused, StillRunning, Unavailable
from imaged.gateway.api.events import LIFE_S
from imaged.gateway.api.status import MAX_WAIT_S
from imaged.gateway.auth import VERBS, marks, public
from imaged.gateway.compat import segmind
from imaged.gateway.openapi import schemas
from imaged.gateway.submit.submission import CANCEL_AFTER, IDEMPOTENCY_KEY, MAX_CANCEL_S
from imaged.params.knobs import KNOBS, WIDEST
from imaged.sampling.schedulers import STEPS

STATUS = "/v2/requests/{job_id}/status"
EVENTS = "/v2/requests/{job_id}/events"
WORKS = ("/v1/{slug}", "/v2/{slug}", "/v2/{slug}/preflight")
DIALECTS = (schemas.OPENAI, schemas.SDAPI)
MIN_STEPS, MAX_STEPS = WIDEST["num_inference_steps"]
#: Media types of answers that are neither JSON nor a file.
TEXTS = {EVENTS: "text/event-stream", "/metrics": "text/plain", "/docs": "text/html"}
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
        for path in (*WORKS[:2], *DIALECTS, "/v2/replay")
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
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        for verb, handler in _handlers(route):
            if summary := _summary(handler):
                mark = getattr(handler, "access", "public")
                paths.setdefault(route.path, {})[verb] = _operation(route.path, verb, mark, summary)
    paths[STATUS] = {
        "get": _operation(STATUS, "get", "owner", "How far a job is; with `wait`, once it ended.")
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "imaged", "version": imaged.__version__},
        "paths": paths,
        "components": {
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic"},
            },
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {"error": {}, "code": {"type": "string"}},
                },
                "Picture": schemas.PICTURE,
            },
        },
    }


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


def _operation(path: str, verb: str, mark: str, summary: str) -> dict[str, Any]:
    dialect = {"openai": "bearer", "sdapi": "basic"}.get(path.split("/")[1])
    schemes = ["key", *([dialect] if dialect else [])]
    named = [(name, "path", {"type": "string"}) for name in re.findall(r"{(\w+)}", path)]
    named += [(name, "query", kind) for name, kind in QUERIES.get(path, {}).items()]
    named += [(name, "header", kind) for name, kind in HEADERS.get(path, {}).items()]
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": f"{verb}{re.sub(r'[^a-z0-9]+', '_', path.lower()).rstrip('_')}",
        "security": [] if mark == "public" else [{name: []} for name in schemes],
        "parameters": [
            {"name": name, "in": place, "required": place == "path", "schema": kind}
            for name, place, kind in named
        ],
        "responses": _responses(path, verb, mark),
    }
    if verb == "post":
        picture = {"$ref": "#/components/schemas/Picture"}
        body: dict[str, Any] = (
            {"anyOf": [picture, schemas.QUOTED]} if path in WORKS[:2] else picture
        )
        body = {"allOf": [body, schemas.DRAFTED]} if path in WORKS[1:] else body
        body = body if path in WORKS else schemas.REQUESTS.get(path, {"type": "object"})
        kinds = FORMS if path in WORKS else FORMS[:1]
        operation["requestBody"] = {
            "required": True,
            "content": {kind: {"schema": body} for kind in kinds},
        }
    return operation


def _responses(path: str, verb: str, mark: str) -> dict[str, Any]:
    binary = {"schema": {"type": "string", "contentEncoding": "binary"}}
    content: dict[str, Any] = {
        "application/json": {"schema": schemas.ANSWERS.get((verb, path), {})}
    }
    if path in (WORKS[0], "/files/{name}"):
        content |= {"image/jpeg": binary, "image/png": binary}
    if path in TEXTS:
        content = {TEXTS[path]: {"schema": schemas.TEXT}}
    refusals = [kind for kind in _refusals(Refused) if _may(kind, verb, mark)]
    found: dict[str, Any] = {"200": {"description": "It worked.", "content": content}}
    for kind in sorted(refusals, key=lambda kind: kind.status or 0):
        text = (kind.__doc__ or "").strip().split("\n")[0]
        before = found.get(str(kind.status), {}).get("description", "")
        found[str(kind.status)] = _refusal(f"{before} {text}".strip())
    if path == EVENTS:
        found["204"] = {"description": "Last-Event-ID is the stream's last: there is no more."}
    if mark == "owner":
        found["422"] = _refusal("The job ran and FAILED; the body is the job's.")
    found["default"] = _refusal("Refused, with the reason.")
    return found


def _refusals(kind: type[ImagedError]) -> Iterator[type[ImagedError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _refusals(child)


def _may(kind: type[ImagedError], verb: str, mark: str) -> bool:
    """Whether an operation can answer with this error, by its verb and who may call it."""
    if kind.status == 401:
        return mark != "public"
    if verb == "post":
        return kind.status not in (404, 405, 431) or kind.code in (
            "unknown_model",
            "unknown_webhook",
        )
    return kind.code == ("unknown_request" if mark == "owner" else "") or (
        issubclass(kind, Unavailable) and kind is not StillRunning
    )


def _refusal(text: str) -> dict[str, Any]:
    body = {"schema": {"$ref": "#/components/schemas/Error"}}
    return {"description": text, "content": {"application/json": body}}
