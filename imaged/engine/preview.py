"""Previews without the VAE: each latent cell becomes one pixel by a linear map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch

from imaged.engine.decode import StepExecutor, unscale
from imaged.engine.nets.vae import VAE
from imaged.engine.out_of_memory import is_full
from imaged.engine.run import Run

PATCH = 4  # cells a side of one colour in the latents that the map is fitted on
FITTED_ON = 8  # patches a side


@dataclass(frozen=True)
class Preview:
    """`rgb` holds height * width * 3 bytes; made after UNet call number `call`."""

    rgb: bytes
    width: int
    height: int
    call: int


class LatentToRgb:
    """(C,) latent -> RGB, fitted once by least squares on the VAE's decode of random patches."""

    def __init__(self, vae: VAE, channels: int) -> None:
        self._weights = _fit(vae, channels)  # (C + 1, 3)

    def __call__(self, latent: torch.Tensor, call: int) -> Preview:
        """(C, h, w) estimate of the clean latent -> an image of w by h pixels."""
        cells = _with_one(latent.float().cpu().flatten(1).T)
        rgb = ((cells @ self._weights).clamp(-1, 1) + 1) * 127.5
        rgb = rgb.nan_to_num(0).round().to(torch.uint8)
        _, height, width = latent.shape
        return Preview(rgb.numpy().tobytes(), width, height, call)


class Previews:
    """The newest preview of each image that has one.

    on:  whether any are made; out of memory turns them off, for images need it more.
    rgb: the map, fitted in the decoder's executor.
    """

    def __init__(
        self, executor: StepExecutor | ThreadPoolExecutor, vae: VAE, channels: int, *, on: bool
    ) -> None:
        self.on, self._executor = on, executor
        self._newest: WeakKeyDictionary[Run, Preview] = WeakKeyDictionary()
        self.rgb = executor.submit(LatentToRgb, vae, channels) if on else None
        if isinstance(executor, StepExecutor):
            executor.step()

    def newest(self, run: Run) -> Preview | None:
        return self._newest.get(run)

    def make(self, run: Run) -> None:
        """Make one once the map is fitted; on a GPU in the decoder's thread."""
        if not self.on or self.rgb is None or not self.rgb.done():
            return
        with self._off_if_full():
            make = partial(self.rgb.result(), run.result, run.call)
            if isinstance(self._executor, StepExecutor):
                self._newest[run] = make()
            else:
                self._executor.submit(self._keep, run, make)

    def _keep(self, run: Run, make: Callable[[], Preview]) -> None:
        with self._off_if_full():
            self._newest[run] = make()

    @contextmanager
    def _off_if_full(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_full(error):
                raise
            self.on = False


@torch.inference_mode()
def _fit(vae: VAE, channels: int) -> torch.Tensor:
    """(C + 1, 3) weights; the patches are seeded, so that a checkpoint has one map."""
    generator = torch.Generator("cpu").manual_seed(0)
    patches = torch.randn(channels, FITTED_ON, FITTED_ON, generator=generator)
    latent = patches.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    z = unscale(vae, latent.to(vae.device))
    pixels = vae(z[None].to(vae.dtype)).float()
    means = torch.nn.functional.adaptive_avg_pool2d(pixels, FITTED_ON)[0].cpu()
    cells = _with_one(patches.flatten(1).T)
    weights: torch.Tensor = torch.linalg.lstsq(cells, means.flatten(1).T.clamp(-1, 1)).solution
    return weights


def _with_one(cells: torch.Tensor) -> torch.Tensor:
    return torch.cat([cells, torch.ones(len(cells), 1)], dim=1)
