"""What a key's holder asks about the account."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from imaged.gateway.replies import dollars
from imaged.gateway.state import Gateway
from imaged.store import ledger


async def user_credits(request: Request) -> Response:
    """GET /v1/get-user-credits"""
    gateway = Gateway.of(request)
    key = await gateway.admission.key(request.headers.get("x-api-key"))

    def read() -> int:
        with gateway.db.read() as connection:
            return ledger.free(connection, key.id)

    return JSONResponse({"credits": dollars(await asyncio.to_thread(read)), "free-credits": 0.0})
