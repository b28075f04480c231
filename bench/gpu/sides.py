"""Our engine and the peers' pipelines with one checkpoint on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.sides import peer
from bench.sides.agree import agreement
from imaged.engine.engine import Engine
from imaged.engine.loading.load import Nets, load
from imaged.params.image_params import ImageParams

T = TypeVar("T")
STEPS = 30  # of a job, if nothing else is said


@dataclass
class Bench:
    """One checkpoint on one device, with our engine and the peers' pipelines."""

    folder: Path
    device: torch.device
    nets: Nets
    diffusers: Path | None
    ceilings: dict[str, float] = field(default_factory=dict)
    agreed: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, device: str, diffusers: Path | None) -> Bench:
        where = torch.device(device)
        return cls(folder, where, load(folder, where), diffusers)

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet."""
        return torch.float32 if not self.cuda else torch.bfloat16

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, full: Sequence[T], small: Sequence[T]) -> Sequence[T]:
        return full if self.cuda else small

    @property
    def pixels(self) -> int:
        return self.pick([1024], [512])[0]

    @property
    def levels(self) -> float:
        """How far two pictures may be apart: bfloat16 rounds on each side in its own way."""
        return self.pick([8.0], [1.0])[0]

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.nets, graphs=self.cuda)

    @cached_property
    def eager(self) -> Any:
        return peer.pipeline(self.folder, self.device.type)

    @cached_property
    def compiled(self) -> Any:
        """What diffusers' own guide to speed says, as far as it keeps its compile time sane."""
        pipe = peer.pipeline(self.folder, self.device.type)
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        pipe.unet.fuse_qkv_projections()
        # a program for each width, size and batch, none of them for sizes in general
        torch._dynamo.config.recompile_limit = 256
        pipe.unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
        return pipe

    def peers(self) -> list[tuple[str, Any]]:
        """Name and pipeline; compiled on a GPU only, where it pays."""
        found = [("diffusers", self.eager)]
        return found + ([("diffusers compiled", self.compiled)] if self.cuda else [])


def job(pixels: int, n: int, steps: int = STEPS) -> ImageParams:
    return ImageParams(
        f"a castle by the sea, number {n}",
        scheduler="Euler",
        num_inference_steps=steps,
        guidance_scale=8.0,
        seed=n,
        img_width=pixels,
        img_height=pixels,
    )


def agreed(bench: Bench, steps: int) -> dict[str, float]:
    """Our picture and the pipeline's."""
    ours, theirs = job(bench.pixels, 1, steps), peer.draw(bench.eager, job(bench.pixels, 1, steps))
    other = job(bench.pixels, 2, steps)
    return agreement(picture(bench, ours), peer.jpeg(theirs), picture(bench, other), bench.levels)


def picture(bench: Bench, params: ImageParams) -> bytes:
    """Our engine's picture as JPEG."""
    from PIL import Image

    bench.engine.submit("one", params)
    while not (outcomes := bench.engine.tick()):
        pass
    if outcomes[0].error is not None:
        raise outcomes[0].error
    made = outcomes[0].pictures[0]
    return peer.jpeg(Image.frombytes("RGB", (made.width, made.height), made.rgb))
