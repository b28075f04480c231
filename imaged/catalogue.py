"""Models on offer: what a slug means, where its checkpoint lies and what a picture costs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from imaged.params import KNOBS, ImageParams, Knob

MICRO = Path(__file__).parent / "checkpoints" / "micro"
SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
MICROS = 1_000_000  # micro-dollars in a dollar
STANDARD_PRICE = 8_000  # micro-dollars for 1024 x 1024 at 25 UNet calls


@dataclass(frozen=True)
class Model:
    """One entry of the catalogue."""

    slug: str
    title: str
    checkpoint: Path
    price_micros: int = STANDARD_PRICE  # of one picture of 1024 x 1024 at 25 UNet calls
    knobs: tuple[Knob, ...] = KNOBS  # an alias may take wider ranges

    @property
    def checkpoint_name(self) -> str:
        """What results, listings and pages call the weights."""
        return (
            "micro"
            if self.checkpoint == MICRO
            else self.checkpoint.name.removesuffix(".safetensors")
        )


DEFAULT_SLUG = "sdxl1.0-yamers-realistic"

#: Served when nothing else was added under the same slug.
BUILT_IN = (
    Model(DEFAULT_SLUG, "Yamer's Realistic SDXL", MICRO),
    Model("micro", "micro, the small checkpoint that comes with imaged", MICRO),
)


def price_micros(model: Model, params: ImageParams) -> int:
    """Price of a whole job: proportional to pixels, UNet calls and samples; never zero."""
    pixels = params.img_width * params.img_height / (1024 * 1024)
    share = pixels * params.unet_calls / 25 * params.samples
    return max(1, math.ceil(model.price_micros * share))
