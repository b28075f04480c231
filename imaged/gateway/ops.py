"""What operators and their machines ask: alive, ready, which models; and the chores of time."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from imaged.catalogue import MICRO
from imaged.gateway.access import public
from imaged.gateway.replies import dollars
from imaged.gateway.state import Gateway
from imaged.params import Knob, plain
from imaged.store import demand, history, queue
from imaged.store.schema import workers

log = logging.getLogger(__name__)

CHORES_S = 2.0


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


@public
async def list_models(request: Request) -> Response:
    """GET /v1/models: what can be asked for, by whose weights, at what price.

    `state`: BUSY, READY, STARTING, UNAVAILABLE or UNLOADED, the best that a worker says of it.
    """
    gateway = Gateway.of(request)
    admission = gateway.admission

    def states() -> dict[str, str]:
        with gateway.db.read() as connection:
            return demand.states(connection, time.time() - gateway.settings.lease_s)

    offered, found = await admission.catalogue(), await asyncio.to_thread(states)
    return JSONResponse(
        {
            "models": [
                {
                    "slug": m.slug,
                    "aliases": admission.aliases_of(m.slug),
                    "title": m.title,
                    "description": m.description,
                    "licence": m.licence,
                    "state": found.get(m.slug, "UNLOADED"),
                    "checkpoint": m.checkpoint_name,
                    "stand_in": m.checkpoint == MICRO and m.slug != "micro",
                    "price_1024px_25_steps": dollars(m.price_micros),
                    "parameters": [_parameter(knob) for knob in m.knobs],
                    "sample": dict(m.sample),
                }
                for m in offered.values()
            ]
        }
    )


def _parameter(knob: Knob) -> dict[str, Any]:
    return {
        "name": knob.name,
        "type": knob.kind,
        "default": plain(knob.default),
        "required": knob.required,
        "allowed": knob.allowed,
        "description": knob.text,
    }


async def chores(gateway: Gateway) -> None:
    """Every few seconds: reclaim lost jobs, end overdue ones, forget expired ones."""
    swept = False
    while True:
        await asyncio.sleep(CHORES_S)
        try:
            await asyncio.to_thread(_chores_once, gateway)
            if not swept:
                await asyncio.to_thread(_sweep, gateway)
                swept = True
        except Exception:  # whatever it is: without chores nothing expires and nothing is reclaimed
            log.exception("chores failed; trying again")


def _chores_once(gateway: Gateway) -> None:
    s = gateway.settings
    now = time.time()  # before the wait for the write lock: who waits for it too is not silent
    with gateway.db.write() as connection:
        queue.reap(
            connection,
            now,
            lease_s=s.lease_s,
            queue_s=s.queue_s,
            run_s=s.run_s,
            retention_s=s.retention_s,
        )
        if s.history_s > 0:
            history.keep(connection, now)
        history.forget(connection, now - s.history_s)
        gone = queue.expire(connection, now)
    for job in gone:  # after the commit: no row may point to a missing file
        try:
            gateway.blobs.delete_of(job.id)
        except OSError:
            log.exception("the pictures of %s stay behind", job.id)


def _sweep(gateway: Gateway) -> None:
    """Pictures without a row: the process died between forgetting a job and deleting them."""
    old = gateway.blobs.job_ids(older_than=time.time() - gateway.settings.retention_s)
    for job_id in old:
        with gateway.db.read() as connection:
            known = queue.read(connection, [job_id])
        if not known:
            gateway.blobs.delete_of(job_id)
