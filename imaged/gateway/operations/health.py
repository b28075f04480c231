"""Liveness and readiness."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from imaged.gateway.auth import public
from imaged.gateway.context import Gateway
from imaged.store.jobs import model_demand


@public
async def livez(_: Request) -> Response:
    """GET /livez: the event loop turns."""
    return JSONResponse({"status": "ok"})


@public
async def readyz(request: Request) -> Response:
    """GET /readyz: 200 when the store answers and at least one worker holds a checkpoint."""
    gateway = Gateway.of(request)
    oldest = time.time() - gateway.settings.lease_s
    count = await gateway.db.query(lambda c: model_demand.workers_since(c, oldest, ready=True))
    body = {"status": "ready" if count else "no worker is ready", "workers": count}
    return JSONResponse(body, 200 if count else 503)
