"""What many write first: FastAPI, one diffusers pipeline, a lock around it.

    python -m bench.peer_lock --checkpoint FOLDER --port N

POST /generate takes the same JSON as our API and answers with a JPEG.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import click

from bench import peer
from imaged.params import read_params


def build(pipe: Any) -> Any:
    from fastapi import Body, FastAPI, Response

    app, lock = FastAPI(), threading.Lock()

    def generate(body: Any = Body()) -> Any:  # noqa: B008 (how FastAPI is written)
        params, _ = read_params(body)
        with lock:
            picture = peer.draw(pipe, params)
        return Response(peer.jpeg(picture), media_type="image/jpeg")

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

    app = build(peer.pipeline(checkpoint, device))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
