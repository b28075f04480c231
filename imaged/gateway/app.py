"""The gateway put together: routes, error answers, guards, chores; nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import sqlalchemy as sa
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from imaged.errors import ImagedError, Unavailable, UnknownPath, WrongMethod
from imaged.gateway import account, events, images, ops, replies, webhooks
from imaged.gateway.middleware import Guard
from imaged.gateway.state import Gateway
from imaged.gateway.status import Status
from imaged.settings import Settings

log = logging.getLogger(__name__)


async def read_only(_: Request) -> Response:
    """Takes a POST to a fixed path before /v1/{slug} takes its last word for a model."""
    raise HTTPException(405, headers={"allow": "GET, HEAD"})


ROUTES = [
    Route("/livez", ops.livez),
    Route("/readyz", ops.readyz),
    Route("/files/{name}", images.file),
    Route("/v1/models", ops.list_models),
    Route("/v1/get-user-credits", account.user_credits),
    Route("/v1/requests/{job_id}", images.poll),
    Route("/v2/requests/{job_id}", images.OwnRequest),
    Route("/v2/requests/{job_id}/events", events.events),
    *(Route(f"/v1/{name}", read_only, methods=["POST"]) for name in ("models", "get-user-credits")),
    Route("/webhook/get", webhooks.listing),
    Route("/webhook/add", webhooks.add, methods=["POST"]),
    Route("/webhook/update", webhooks.update, methods=["POST"]),
    Route("/webhook/inactive", webhooks.inactive),
    Route("/webhook/dispatch-logs", webhooks.dispatch_logs),
    Route("/v1/{slug}", images.create, methods=["POST"]),
    Route("/v2/{slug}", images.submit, methods=["POST"]),
]


def build_app(settings: Settings, stopping: Callable[[], bool] = lambda: False) -> ASGIApp:
    """The whole gateway as one ASGI app; it opens the store now and closes it at shutdown.

    Event streams end when `stopping` says so; a server that has to stop waits for them.
    """
    gateway = Gateway.open(settings, stopping)

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
    app.state.gateway = gateway
    return Guard(Status(app, gateway), settings.max_body)


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
    return replies.error(ImagedError("Internal server error"))
