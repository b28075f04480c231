"""Pictures as tensors and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image


def to_tensor(image: Any) -> torch.Tensor:
    """An RGB picture as (3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_image(x: torch.Tensor) -> Image.Image:
    """(3, height, width) in [-1, 1] as an RGB picture."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
