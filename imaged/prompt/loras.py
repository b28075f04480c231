"""LoRAs of a request: in the field `loras`, or as tags in the prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_LORAS, MAX_LORA_WEIGHT = 8, 10.0
LORA_NAME = re.compile(r"[^/\\:<>.\x00-\x1f][^/\\:<>\x00-\x1f]{0,99}")  # of a file in one folder
_WEIGHT = r"(?::([+-]?(?:\d{1,4}\.?\d{0,9}|\.\d{1,9})))?"
_TAG = re.compile(f"<lora:({LORA_NAME.pattern}){_WEIGHT}{_WEIGHT}>")


@dataclass(frozen=True)
class Lora:
    """A LoRA by file name without ending, and its weights for UNet and text encoders."""

    name: str
    unet: float = 1.0
    text: float = 1.0


def tagged(prompt: str) -> tuple[Lora, ...]:
    """The LoRAs that a prompt names, as A1111 has it: <lora:NAME:TEXT WEIGHT:UNET WEIGHT>; one
    weight is for both.
    """
    return tuple(Lora(n, float(u or t or 1), float(t or 1)) for n, t, u in _TAG.findall(prompt))


def without_tags(prompt: str) -> str:
    """The prompt without its LoRA tags."""
    return _TAG.sub("", prompt)
