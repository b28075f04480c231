"""The ASGI app: routes, error answers, middleware, background tasks."""

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
from imaged.gateway.api import (
    account,
    drafts,
    events,
    files,
    images,
    models,
    preflight,
    replay,
    webhooks,
)
from imaged.gateway.api.status import Status
from imaged.gateway.auth import public, route
from imaged.gateway.compat import a1111, openai, segmind
from imaged.gateway.context import Gateway
from imaged.gateway.openapi import document
from imaged.gateway.operations import health, maintenance, metrics
from imaged.gateway.present.errors import error_response
from imaged.gateway.transport.body_limit import CLOSE, BodyLimit

log = logging.getLogger(__name__)


@public
async def read_only(_: Request) -> Response:
    """405 for a POST to a fixed path under /v1, which would match /v1/{slug} else."""
    raise HTTPException(405, headers={"allow": "GET, HEAD"})


FIXED = ("models", "schedulers", "receipt-key", "get-user-credits", "credits", "health")
HISTORY = "/inference-request/request-history"

ROUTES = [
    route("/livez", health.livez),
    route("/readyz", health.readyz),
    route("/metrics", metrics.metrics),
    route("/openapi.json", document.openapi),
    route("/docs", document.page),
    route("/files/{name}", files.file),
    route("/v1/models", models.list_models),
    route("/v1/schedulers", models.list_schedulers),
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
    route("/inference-model-information/list", segmind.model_list),
    route("/inference-request/recent-generations", segmind.recent),
    route("/inference-request/generations", segmind.generations),
    route(HISTORY, segmind.request_history),
    route(HISTORY + "/{request_id}", segmind.request_record),
    route("/api/auth/authenticate", account.current),
    route("/openai/v1/images/generations", openai.generations, methods=["POST"]),
    route("/openai/v1/models", openai.list_models),
    route("/openai/v1/models/{slug}", openai.one_model),
    route("/sdapi/v1/txt2img", a1111.txt2img, methods=["POST"]),
    route("/sdapi/v1/samplers", a1111.samplers),
    route("/sdapi/v1/schedulers", a1111.schedulers),
    route("/sdapi/v1/scripts", a1111.scripts),
    route("/sdapi/v1/sd-models", a1111.sd_models),
    route("/sdapi/v1/loras", a1111.loras),
    route("/sdapi/v1/options", a1111.options),
    route("/sdapi/v1/progress", a1111.progress),
]

#: CORS: request headers that a page may send, and response headers that it may read.
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
    """The app over one gateway, which is closed at shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(maintenance.chores(gateway)),
            asyncio.create_task(gateway.webhook_delivery.run()),
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
    app.state.gateway, app.state.described = gateway, document.Described.of(ROUTES)
    settings = gateway.settings
    return _cors(BodyLimit(Status(app, gateway), settings.max_body), settings.cors)


def _cors(app: ASGIApp, origins: str) -> ASGIApp:
    """Allow cross-origin calls from these origins, separated by commas; none without any."""
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
    return error_response(problem)


async def _http(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    known = WrongMethod() if problem.status_code == 405 else UnknownPath()
    return error_response(known, problem.headers)


async def _busy(_: Request, problem: Exception) -> Response:
    log.error("the store did not answer", exc_info=problem)
    return error_response(Unavailable())


async def _unknown(_: Request, problem: Exception) -> Response:
    log.error("unexpected", exc_info=problem)
    # Starlette raises it again and uvicorn hangs up: without the header, on the next request
    return error_response(ImagedError("Internal server error"), CLOSE)
