"""Image files, by signed links."""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request
from starlette.responses import Response

from imaged.errors import UnknownPath
from imaged.gateway.auth import public
from imaged.gateway.context import Gateway
from imaged.gateway.present.links import media_type
from imaged.store import blobs


@public
async def file(request: Request) -> Response:
    """GET /files/{name}?exp=&sig=: a picture, to anyone who has its link."""
    gateway = Gateway.of(request)
    name = request.path_params["name"]
    query = request.query_params
    signed = blobs.PICTURE.fullmatch(name) and blobs.verify(
        gateway.secret, name, query.get("exp", ""), query.get("sig", ""), time.time()
    )
    content = await asyncio.to_thread(gateway.blobs.read, name) if signed else None
    if content is None:
        raise UnknownPath("There is no such file, or the link has expired.")
    headers = {
        "cache-control": "private, max-age=3600",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    return Response(content, media_type=media_type(name), headers=headers)
