"""A checkpoint's nets in float32, for pictures that were none in less."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from imaged.engine.load import Nets
from imaged.engine.lora import Loras
from imaged.engine.unet import Unet


def in_float32(nets: Nets, loras: Path | None) -> tuple[Unet, Any, Loras]:
    """A UNet beside the checkpoint's own, as much memory again or twice as much, and a VAE, which
    may be in float32 as it is. `loras`: the folder of their files.
    """
    unet = copy.deepcopy(nets.unet).float()
    vae = nets.vae if nets.vae.dtype == torch.float32 else copy.deepcopy(nets.vae).float()
    return Unet(unet), vae, Loras({"unet": unet}, loras)
