"""Liveness and readiness."""

from __future__ import annotations

import time

from starlette.requests import Request

from imaged.gateway.auth import public
from imaged.gateway.context import Gateway
from imaged.gateway.present.answer import Answer, Body
from imaged.store.jobs import model_demand


class Alive(Body):
    status: str


class Ready(Body):
    """workers: how many hold a checkpoint."""

    status: str
    workers: int


@public
async def livez(_: Request) -> Answer[Alive]:
    """GET /livez: the event loop turns."""
    return Answer(Alive("ok"))


@public
async def readyz(request: Request) -> Answer[Ready]:
    """GET /readyz: 200 when the store answers and at least one worker holds a checkpoint."""
    gateway = Gateway.of(request)
    oldest = time.time() - gateway.settings.lease_s
    count = await gateway.db.query(lambda c: model_demand.workers_since(c, oldest, ready=True))
    body = Ready("ready" if count else "no worker is ready", count)
    return Answer(body, 200 if count else 503)
