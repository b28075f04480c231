"""From a prompt to weighted tokens in windows, without tensors: what it says at each step and with
what weights (a1111, compel), in what tokens (tokenizer, embeddings, windows),
and a report of all that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

from imaged.errors import BadParameter
from imaged.prompt import a1111, compel
from imaged.prompt.a1111 import BREAK, Span

DIALECTS = ("a1111", "plain", "compel")
EMPHASES = ("no norm", "original", "none")
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


@dataclass(frozen=True)
class Reading:
    """How prompts are read.

    dialect:  one of DIALECTS.
    emphasis: what a weight does to a token's vector: it multiplies ("no norm"), it multiplies and
              the window's mean is restored ("original"), or nothing ("none").
    skip:     layers of the text encoders to leave out before the last, which SDXL never uses.
    """

    dialect: str = "a1111"
    emphasis: str = "no norm"
    skip: int = 0


A1111 = Reading()


@dataclass(frozen=True)
class Prompt:
    """A prompt and how it is read. Each part is read when it is first asked for, and kept: rules,
    report and text encoders share one reading. CPU-bound for a long one: use a thread.

    steps: of the image, over which it may change.
    """

    sent: str
    reading: Reading = A1111
    steps: int = 1

    @cached_property
    def loras(self) -> tuple[Lora, ...]:
        """The LoRAs that its tags name, as A1111 has it: <lora:NAME:TEXT WEIGHT:UNET WEIGHT>; one
        weight is for both.
        """
        tags = _TAG.findall(self.sent)
        return tuple(Lora(n, float(u or t or 1), float(t or 1)) for n, t, u in tags)

    @cached_property
    def text(self) -> str:
        """What is to be drawn: the prompt without LoRA tags."""
        return _TAG.sub("", self.sent)

    @cached_property
    def by_step(self) -> tuple[str, ...]:
        """What it says at each step, with weights as written."""
        if self.reading.dialect != "a1111":
            return (self.text,) * self.steps
        return tuple(a1111.texts(self.text, self.steps))

    @cached_property
    def structure(self) -> compel.Structure:
        """In the dialect compel: its parts; raises BadParameter."""
        return compel.parse(self.text)

    @cached_property
    def spans(self) -> dict[str, tuple[Span, ...]]:
        """Each different text of `by_step`, in pieces with their weights."""
        return {text: tuple(self._spans(text)) for text in dict.fromkeys(self.by_step)}

    def _spans(self, text: str) -> list[Span]:
        if self.reading.dialect == "compel":
            parts = [part.spans for part in self.structure.parts]
            return [span for part in parts for span in ((BREAK, 1.0), *part)][1:]
        return [(text, 1.0)] if self.reading.dialect == "plain" else a1111.spans(text)

    def check(self, name: str) -> None:
        """Raises BadParameter for what cannot be read in this dialect; name: of the parameter."""
        if self.reading.dialect != "compel":
            return
        if find_spec("compel") is None:
            raise BadParameter(
                "prompt_dialect", "compel needs its package on this server: pip install compel"
            )
        try:
            _ = self.structure
        except BadParameter as problem:
            raise BadParameter(name, problem.detail.removeprefix("prompt ")) from None

    def plain(self, text: str, between: str = "") -> str:
        """One of the texts as the text encoders read it, without weights. between: is put between
        pieces of different weight.
        """
        if self.reading.dialect == "compel" and not between:
            return compel.unmarked(text)
        return between.join(" " if piece == BREAK else piece for piece, _ in self.spans[text])
