"""Liveness and readiness."""

from __future__ import annotations

import asyncio
import time

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from imaged.gateway.auth import public
from imaged.gateway.context import Gateway
from imaged.store.sql.schema import workers


@public
async def livez(_: Request) -> Response:
    """GET /livez: the event loop turns."""
    return JSONResponse({"status": "ok"})


@public
async def readyz(request: Request) -> Response:
    """GET /readyz: 200 when the store answers and at least one worker holds a checkpoint."""
    gateway = Gateway.of(request)

    def fresh_workers() -> int:
        oldest = time.time() - gateway.settings.lease_s
        with gateway.db.read() as connection:
            return int(
                connection.execute(
                    sa.select(sa.func.count()).where(
                        workers.c.seen_at > oldest, workers.c.checkpoint.is_not(None)
                    )
                ).scalar_one()
            )

    count = await asyncio.to_thread(fresh_workers)
    body = {"status": "ready" if count else "no worker is ready", "workers": count}
    return JSONResponse(body, 200 if count else 503)
