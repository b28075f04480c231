"""What many write first: FastAPI, one diffusers pipeline, one picture at a time.

    python -m bench.sides.peer_lock --checkpoint FOLDER --port N

POST /generate takes the same JSON as our API and answers with a JPEG. The lock is a single thread:
with one around calls from FastAPI's many threads, each of them would bring threads of its own for
its arithmetic, more than a CPU has cores (decision 17).
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from bench.sides import peer
from imaged.params.image_params import read_params


def build(checkpoint: Path, device: str) -> Any:
    from fastapi import Body, FastAPI, Response

    app, one = FastAPI(), ThreadPoolExecutor(1)
    pipe = one.submit(peer.pipeline, checkpoint, device).result()

    async def generate(body: Any = Body()) -> Any:  # noqa: B008 (how FastAPI is written)
        params, _ = read_params(body)
        content = await asyncio.get_running_loop().run_in_executor(
            one, lambda: peer.jpeg(peer.draw(pipe, params))
        )
        return Response(content, media_type="image/jpeg")

    app.add_api_route("/generate", generate, methods=["POST"])
    app.add_api_route("/ready", lambda: {"ready": True})
    return app


@click.command()
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--port", required=True, type=int)
@click.option("--device", default="cpu", show_default=True)
def main(checkpoint: Path, port: int, device: str) -> None:
    """Serve one checkpoint, one picture at a time."""
    import uvicorn

    app = build(checkpoint, device)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
