"""The gateway put together: routes, error answers, guards, chores; nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import sqlalchemy as sa
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from imaged.errors import ImagedError, Unavailable, UnknownPath, WrongMethod
from imaged.gateway import (
    account,
    drafts,
    events,
    history,
    images,
    metrics,
    openai,
    openapi,
    ops,
    preflight,
    replay,
    replies,
    sdapi,
    webhooks,
)
from imaged.gateway.access import public, route
from imaged.gateway.middleware import CLOSE, Guard
from imaged.gateway.state import Gateway
from imaged.gateway.status import Status

log = logging.getLogger(__name__)


@public
async def read_only(_: Request) -> Response:
    """Takes a POST to a fixed path before /v1/{slug} takes its last word for a model."""
    raise HTTPException(405, headers={"allow": "GET, HEAD"})


FIXED = ("models", "schedulers", "receipt-key", "get-user-credits", "credits", "health")
HISTORY = "/inference-request/request-history"

ROUTES = [
    route("/livez", ops.livez),
    route("/readyz", ops.readyz),
    route("/metrics", metrics.metrics),
    route("/openapi.json", openapi.openapi),
    route("/docs", openapi.page),
    route("/files/{name}", images.file),
    route("/v1/models", ops.list_models),
    route("/v1/schedulers", preflight.list_schedulers),
    route("/v1/receipt-key", replay.signer),
    route("/v1/get-user-credits", account.user_credits),
    route("/v1/credits", account.credits),
    route("/v1/health", account.health),
    route("/v1/requests/{job_id}", images.poll),
    route("/v2/requests/{job_id}", images.OwnRequest),
    route("/v2/requests/{job_id}/events", events.events),
    route("/v2/requests/{job_id}/finish", drafts.finish, methods=["POST"]),
    *(route(f"/v1/{name}", read_only, methods=["POST"]) for name in FIXED),
    route("/v1/{slug}", images.create, methods=["POST"]),
    route("/v2/replay", replay.replay, methods=["POST"]),
    route("/v2/{slug}", images.submit, methods=["POST"]),
    route("/v2/{slug}/preflight", preflight.preflight, methods=["POST"]),
    route("/webhook/get", webhooks.listing),
    route("/webhook/add", webhooks.add, methods=["POST"]),
    route("/webhook/update", webhooks.update, methods=["POST"]),
    route("/webhook/inactive", webhooks.inactive),
    route("/webhook/dispatch-logs", webhooks.dispatch_logs),
    route("/inference-model-information/list", history.model_list),
    route("/inference-request/recent-generations", history.recent),
    route("/inference-request/generations", history.generations),
    route(HISTORY, history.request_history),
    route(HISTORY + "/{request_id}", history.request_record),
    route("/api/auth/authenticate", account.current),
    route("/openai/v1/images/generations", openai.generations, methods=["POST"]),
    route("/openai/v1/models", openai.list_models),
    route("/openai/v1/models/{slug}", openai.one_model),
    route("/sdapi/v1/txt2img", sdapi.txt2img, methods=["POST"]),
    route("/sdapi/v1/samplers", sdapi.samplers),
    route("/sdapi/v1/schedulers", sdapi.schedulers),
    route("/sdapi/v1/scripts", sdapi.scripts),
    route("/sdapi/v1/sd-models", sdapi.sd_models),
    route("/sdapi/v1/loras", sdapi.loras),
    route("/sdapi/v1/options", sdapi.options),
    route("/sdapi/v1/progress", sdapi.progress),
]

#: What a web page may send, beside what it always may, and what it may see of the answer.
CORS_HEADERS = (
    "access-control-allow-origin",  # the npm client sends it
    "authorization",
    "cancel-after",
    "content-type",
    "idempotency-key",
    "last-event-id",
    "x-api-key",
)
CORS_EXPOSED = (
    "idempotent-replayed",
    "retry-after",
    "x-checkpoint",
    "x-cost",
    "x-determinism",
    "x-device",
    "x-dtype",
    "x-engine",
    "x-generation-time",
    "x-output-metadata",
    "x-output-urls",
    "x-rate-limit-limit",
    "x-rate-limit-remaining",
    "x-rate-limit-reset-at-utc",
    "x-remaining-credits",
    "x-request-id",
    "x-safety",
    "x-seed-value",
)


def build_app(gateway: Gateway) -> ASGIApp:
    """The whole gateway as one ASGI app, which closes it at shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(ops.chores(gateway)),
            asyncio.create_task(gateway.dispatcher.run()),
        ]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        gateway.close()

    app = Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        exception_handlers={
            ImagedError: _known,
            HTTPException: _http,
            sa.exc.OperationalError: _busy,
            Exception: _unknown,
        },
    )
    app.router.redirect_slashes = False  # clients of the original take a redirect for success
    app.state.gateway, app.state.described = gateway, openapi.Described.of(ROUTES)
    settings = gateway.settings
    return _cors(Guard(Status(app, gateway), settings.max_body), settings.cors)


def _cors(app: ASGIApp, origins: str) -> ASGIApp:
    """Lets web pages of these origins call; without any, no answer says a word of it."""
    allowed = [origin.strip() for origin in origins.split(",") if origin.strip()]
    if not allowed:
        return app
    return CORSMiddleware(
        app,
        allow_origins=allowed,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=CORS_HEADERS,
        expose_headers=CORS_EXPOSED,
    )


async def _known(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, ImagedError)
    return replies.error(problem)


async def _http(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    known = WrongMethod() if problem.status_code == 405 else UnknownPath()
    return replies.error(known, problem.headers)


async def _busy(_: Request, problem: Exception) -> Response:
    log.error("the store did not answer", exc_info=problem)
    return replies.error(Unavailable())


async def _unknown(_: Request, problem: Exception) -> Response:
    log.error("unexpected", exc_info=problem)
    # Starlette raises it again and uvicorn hangs up: without the header, on the next request
    return replies.error(ImagedError("Internal server error"), CLOSE)
