"""Previews without the VAE: each latent cell becomes one pixel by a linear map."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from imaged.engine.decode import unscale
from imaged.engine.nets.vae import VAE

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
