"""What one picture needs: its seed, its latent's shape and its sampler's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imaged.engine.samplers import Table, table
from imaged.params import ImageParams


@dataclass(frozen=True)
class Plan:
    """One picture of a job; everything about it that is known before the first UNet call."""

    seed: int
    width: int
    height: int
    latent_shape: tuple[int, int, int]
    table: Table
    guidance: float

    @property
    def guided(self) -> bool:
        """At guidance 1 the unconditional half would cancel out, so it is not computed."""
        return self.guidance != 1.0


def plan_images(
    params: ImageParams, scheduler_config: Mapping[str, Any], channels: int, factor: int
) -> list[Plan]:
    """One plan for each sample; sample k has seed `params.seed + k`."""
    assert params.seed >= 0, "the seed is drawn at submit"
    shape = (channels, params.img_height // factor, params.img_width // factor)
    traced = table(params.scheduler, params.num_inference_steps, scheduler_config)
    return [
        Plan(
            params.seed + k,
            params.img_width,
            params.img_height,
            shape,
            traced,
            params.guidance_scale,
        )
        for k in range(params.samples)
    ]
