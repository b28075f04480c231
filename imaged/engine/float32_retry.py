"""A checkpoint's nets in float32, for images that were NaN or flat in half precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from imaged.engine.loading.load import Nets
from imaged.engine.loading.lora import Loras
from imaged.engine.nets.cached_unet import Unet


def in_float32(nets: Nets, loras: Path | None) -> tuple[Unet, Any, Loras]:
    """A float32 copy of the UNet, which takes up to twice its memory again, and a float32 VAE, the
    checkpoint's own if it is float32 already. loras: the folder of their files.
    """
    unet = copy.deepcopy(nets.unet).float()
    vae = nets.vae if nets.vae.dtype == torch.float32 else copy.deepcopy(nets.vae).float()
    return Unet(unet), vae, Loras({"unet": unet}, loras)
