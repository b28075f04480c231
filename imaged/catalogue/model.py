"""A model on offer: its slug, checkpoint, price and parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from imaged.params.knobs import KNOBS, Knob

MICRO = Path(__file__).parents[1] / "checkpoints" / "micro"
SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
MICROS = 1_000_000  # micro-dollars in a dollar
DTYPES = ("fp32", "bf16", "fp16")  # that weights may be held in
CPU_DTYPES = ("fp32", "bf16")  # with bf16 the VAE stays fp32
PREDICTIONS = ("epsilon", "v_prediction")  # what a UNet may have learnt to predict
STANDARD_PRICE = 8_000  # micro-dollars for 1024 x 1024 at 25 UNet calls


class ModelState(StrEnum):
    """State of a model's checkpoint on a worker; on several the best, in this order."""

    BUSY = "BUSY"  # loaded, with jobs
    READY = "READY"  # loaded, idle
    STARTING = "STARTING"  # being loaded
    UNAVAILABLE = "UNAVAILABLE"  # loading failed
    UNLOADED = "UNLOADED"  # no job has needed it

    @property
    def loaded(self) -> bool:
        """Whether jobs can start without loading."""
        return self in (ModelState.BUSY, ModelState.READY)


@dataclass(frozen=True)
class Weights:
    """A checkpoint's files, and how to load them."""

    checkpoint: Path  # a diffusers folder or a safetensors file
    vae: Path | None = None  # replaces the checkpoint's own
    dtype: str = ""  # of DTYPES; empty: what suits the device
    prediction: str = ""  # of PREDICTIONS; empty: what the files say
    zero_snr: bool | None = None  # trained with zero terminal SNR; None: as the files say
    sha256: str = ""  # digest when the model was added; empty: unknown
    cpu_dtype: str = ""  # of CPU_DTYPES: chosen for CPUs when the model was added


@dataclass(frozen=True)
class Model:
    """One entry of the catalogue."""

    slug: str
    title: str
    weights: Weights
    price_micros: int = STANDARD_PRICE  # of one picture of 1024 x 1024 at 25 UNet calls
    knobs: tuple[Knob, ...] = KNOBS  # an alias may take wider ranges
    description: str = ""
    licence: str = ""  # a note for people
    sample: Mapping[str, Any] = field(default_factory=dict, hash=False)  # a request that shows it

    @property
    def checkpoint(self) -> Path:
        return self.weights.checkpoint

    @property
    def checkpoint_name(self) -> str:
        """The checkpoint's name in results and listings."""
        name = self.checkpoint.name.removesuffix(".safetensors")
        return "micro" if self.checkpoint == MICRO else name


DEFAULT_SLUG = "sdxl1.0-yamers-realistic"
