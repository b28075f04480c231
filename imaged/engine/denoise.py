"""One UNet call for any mix of pictures of one shape; guidance per picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from imaged.engine.plan import Plan
from imaged.engine.prompt.encode import Encoded


@dataclass
class Ask:
    """One picture's question: its UNet input at timestep t, and its conditioning."""

    x: torch.Tensor  # (C, h, w)
    t: float
    plan: Plan
    positive: Encoded
    negative: Encoded


@torch.inference_mode()
def denoise(unet: Any, asks: Sequence[Ask]) -> list[torch.Tensor]:
    """The guided model output (C, h, w) of each ask, float32, from one UNet call."""
    rows = [(ask, side) for ask in asks for side in _sides(ask)]
    dtype = unet.dtype
    time_ids = [_time_ids(ask.plan) for ask, _ in rows]
    out = unet(
        torch.stack([ask.x for ask, _ in rows]).to(dtype),
        torch.tensor([ask.t for ask, _ in rows], device=unet.device),
        encoder_hidden_states=torch.stack([side.context for _, side in rows]).to(dtype),
        added_cond_kwargs={
            "text_embeds": torch.stack([side.pooled for _, side in rows]).to(dtype),
            "time_ids": torch.tensor(time_ids, device=unet.device, dtype=dtype),
        },
        return_dict=False,
    )[0].float()
    outputs, row = [], 0
    for ask in asks:
        if ask.plan.guided:
            plain, prompted = out[row], out[row + 1]
            outputs.append(plain + ask.plan.guidance * (prompted - plain))
        else:
            outputs.append(out[row])
        row += 2 if ask.plan.guided else 1
    return outputs


def _sides(ask: Ask) -> tuple[Encoded, ...]:
    return (ask.negative, ask.positive) if ask.plan.guided else (ask.positive,)


def _time_ids(plan: Plan) -> tuple[int, ...]:
    """SDXL's size conditioning: original size, crop corner, target size (height first)."""
    return (plan.height, plan.width, 0, 0, plan.height, plan.width)
