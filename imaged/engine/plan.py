"""What one image needs: its seed, latent shape and sampler table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from imaged.engine.sampling.tables import Table, alphas, frozen, table
from imaged.params.image_params import ImageParams
from imaged.sampling.schedulers import step_of_call


@dataclass(frozen=True)
class Plan:
    """All that is known of one image before its first UNet call."""

    seed: int
    width: int
    height: int
    latent_shape: tuple[int, int, int]
    table: Table
    guidance: float
    alphas: torch.Tensor  # (T,) cumulative products of the training's noise schedule
    prediction: str = "epsilon"
    steps: tuple[int, ...] = ()  # (N,) the step that each UNet call belongs to
    interval: tuple[float, float] = (0.0, 1.0)  # of the steps, in which guidance works
    rescale: float = 0.0  # of what guidance adds, see denoise.py
    sizes: tuple[tuple[int, int] | None, ...] = (None, None, None)  # original, crop and target

    @property
    def guided(self) -> bool:
        """Whether any call uses guidance."""
        return any(map(self.guided_at, range(self.table.calls)))

    def guided_at(self, call: int) -> bool:
        """Whether this call uses guidance. At scale 1 the unconditional half cancels out: it is
        skipped.
        """
        share = self.steps[call] / (self.steps[-1] + 1)
        return self.guidance != 1.0 and self.interval[0] <= share < self.interval[1]

    @property
    def time_ids(self) -> tuple[int, ...]:
        """SDXL's size conditioning: original size, crop corner, target size (height first)."""
        original, crop, target = self.sizes
        own = (self.width, self.height)
        pairs = (original or own, crop or (0, 0), target or own)
        return tuple(n for pair in pairs for n in pair[::-1])

    def levels(self, call: int) -> tuple[float, float]:
        """(sqrt(alpha), sqrt(1 - alpha)) at a call's timestep: shares of signal and of noise."""
        at = min(max(float(self.table.timesteps[call]), 0.0), len(self.alphas) - 1.0)
        below = int(at)
        ends = self.alphas[below : below + 2]
        alpha = float(ends[0] + (ends[-1] - ends[0]) * (at - below))
        return alpha**0.5, (1 - alpha) ** 0.5


def plan_images(
    params: ImageParams, scheduler_config: Mapping[str, Any], channels: int, factor: int
) -> list[Plan]:
    """One plan for each sample; sample k has seed `params.seed + k`."""
    assert params.seed >= 0, "the seed is drawn at submit"
    shape = (channels, params.img_height // factor, params.img_width // factor)
    sampler = table(
        params.scheduler, params.num_inference_steps, scheduler_config, params.scheduler_profile
    )
    return [
        Plan(
            params.seed + k,
            params.img_width,
            params.img_height,
            shape,
            sampler,
            params.guidance_scale,
            _alphas(frozen(scheduler_config)),
            str(scheduler_config.get("prediction_type", "epsilon")),
            tuple(step_of_call(params.scheduler, call) for call in range(sampler.calls)),
            (params.guidance_start, params.guidance_end),
            params.guidance_rescale,
            (params.original_size, params.crop, params.target_size),
        )
        for k in range(params.samples)
    ]


@lru_cache(maxsize=16)
def _alphas(config: tuple[tuple[str, Any], ...]) -> torch.Tensor:
    return alphas(dict(config))
