"""Account routes of a key: credits, identity."""

from __future__ import annotations

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from imaged.gateway.auth import keyed, public
from imaged.gateway.context import Gateway
from imaged.gateway.present.units import dollars
from imaged.store.accounts import ledger
from imaged.store.accounts.keys import Key


@keyed
async def user_credits(request: Request, gateway: Gateway, key: Key) -> Response:
    """GET /v1/get-user-credits: what is left on the key, in dollars."""
    left = await gateway.db.query(lambda c: ledger.free(c, key.id))
    return JSONResponse({"credits": dollars(left), "free-credits": 0.0})


@keyed
async def credits(request: Request, gateway: Gateway, key: Key) -> Response:
    """GET /v1/credits: left and used, in the words of the MCP server."""
    left, used = await gateway.db.query(lambda c: _money(c, key))
    return JSONResponse({"data": {"credits": {"remaining": left, "used": used}}})


@keyed
async def current(request: Request, gateway: Gateway, key: Key) -> Response:
    """GET /api/auth/authenticate: who the key is."""
    left, used = await gateway.db.query(lambda c: _money(c, key))
    return JSONResponse(
        {"user_id": str(key.id), "name": key.name, "credits": left, "credits_used": used}
    )


@public
async def health(_: Request) -> Response:
    """GET /v1/health: the event loop turns."""
    return JSONResponse({"status": "ok"})


def _money(connection: sa.Connection, key: Key) -> tuple[float, float]:
    """(free, charged so far) in dollars."""
    return dollars(ledger.free(connection, key.id)), dollars(ledger.used(connection, key.id))
