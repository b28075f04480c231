"""The least and the usual answer to a status poll.

python -m bench.sides.peer_polls raw --port N        # plain ASGI, the bytes made beforehand
python -m bench.sides.peer_polls fastapi --port N    # FastAPI with a response model
"""

from __future__ import annotations

import json
from typing import Any

import click

BODY = {
    "status": "QUEUED",
    "request_id": "0" * 32,
    "status_url": f"http://127.0.0.1:8000/v2/requests/{'0' * 32}/status",
    "response_url": f"http://127.0.0.1:8000/v2/requests/{'0' * 32}",
    "metrics": {},
}


CONTENT = json.dumps(BODY).encode()
HEADERS = [
    (b"content-type", b"application/json"),
    (b"content-length", str(len(CONTENT)).encode()),
]


async def raw(scope: Any, receive: Any, send: Any) -> None:
    """Answers everything alike, without looking."""
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": CONTENT})


def fastapi() -> Any:
    from fastapi import FastAPI
    from pydantic import BaseModel

    class Status(BaseModel):
        status: str
        request_id: str
        status_url: str
        response_url: str
        metrics: dict[str, float]

    async def status(job_id: str) -> Any:
        return {**BODY, "request_id": job_id}

    app = FastAPI()
    app.add_api_route("/v2/requests/{job_id}/status", status, response_model=Status)
    return app


@click.command()
@click.argument("which", type=click.Choice(["raw", "fastapi"]))
@click.option("--port", required=True, type=int)
def main(which: str, port: int) -> None:
    """Serve one of the two."""
    import uvicorn

    app = raw if which == "raw" else fastapi()
    uvicorn.run(
        app, host="127.0.0.1", port=port, log_level="warning", access_log=False, lifespan="off"
    )


if __name__ == "__main__":
    main()
