"""diffusers' examples/server-async from a public clone, with only the loading of the model swapped.

    git clone --depth 1 https://github.com/huggingface/diffusers
    python -m bench.sides.peer_async --diffusers diffusers --checkpoint FOLDER --port N

The example loads Stable Diffusion 3 onto a GPU; here it is handed an SDXL pipeline. Its server,
its request-scoped pipelines and its saving of pictures are run as they are.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import click

from bench.sides import peer


def model_loading(checkpoint: Path, device: str) -> ModuleType:
    """A stand-in for the example's module `Pipelines`."""

    class ModelPipelineInitializer:
        def __init__(self, **_: Any) -> None:
            self.device = device

        def initialize_pipeline(self) -> Any:
            pipe = peer.pipeline(checkpoint, device)
            return SimpleNamespace(pipeline=pipe, start=lambda: None)

    module = ModuleType("Pipelines")
    vars(module)["ModelPipelineInitializer"] = ModelPipelineInitializer
    return module


@click.command()
@click.option("--diffusers", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--port", required=True, type=int)
@click.option("--device", default="cpu", show_default=True)
def main(diffusers: Path, checkpoint: Path, port: int, device: str) -> None:
    """Serve one checkpoint with the example's server."""
    import uvicorn

    sys.path.insert(0, str(diffusers / "examples" / "server-async"))
    sys.modules["Pipelines"] = model_loading(checkpoint, device)
    example = importlib.import_module("serverasync")
    example.server_config.host, example.server_config.port = "127.0.0.1", port
    uvicorn.run(example.app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
