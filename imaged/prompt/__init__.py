"""From a prompt to weighted tokens in windows, without tensors: what it says at each step
(editing), with what weights (emphasis, compel), in what tokens (tokenizer, embeddings, windows),
and a report of all that.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from imaged.errors import BadParameter
from imaged.prompt import compel, editing
from imaged.prompt.emphasis import BREAK, Span, parse

DIALECTS = ("a1111", "plain", "compel")
EMPHASES = ("no norm", "original", "none")


@dataclass(frozen=True)
class Reading:
    """How prompts are read.

    dialect:  one of DIALECTS.
    emphasis: what a weight does to a token's vector: it multiplies ("no norm"), it multiplies and
              the window's mean is restored ("original"), or nothing ("none").
    skip:     layers of the text encoders that are left out beyond the last, which SDXL never uses.
    """

    dialect: str = "a1111"
    emphasis: str = "no norm"
    skip: int = 0

    def texts(self, prompt: str, steps: int) -> list[str]:
        """What the prompt says at each step."""
        return editing.texts(prompt, steps) if self.dialect == "a1111" else [prompt] * steps

    def spans(self, text: str) -> list[Span]:
        """One step's text in pieces with their weights."""
        if self.dialect == "compel":
            parts = [part.spans for part in compel.parse(text).parts]
            return [span for part in parts for span in ((BREAK, 1.0), *part)][1:]
        return [(text, 1.0)] if self.dialect == "plain" else parse(text)

    def check(self, prompt: str, name: str) -> None:
        """Raises BadParameter for what cannot be read in this dialect; `name`: of the field."""
        if self.dialect != "compel":
            return
        if find_spec("compel") is None:
            raise BadParameter(
                "prompt_dialect", "compel needs its package on this server: pip install compel"
            )
        try:
            compel.parse(prompt)
        except BadParameter as problem:
            raise BadParameter(name, problem.detail.removeprefix("prompt ")) from None

    def plain(self, text: str, between: str = "") -> str:
        """One step's text as the text encoders read it, without weights."""
        if self.dialect == "compel" and not between:
            return compel.unmarked(text)
        words = (" " if piece == BREAK else piece for piece, _ in self.spans(text))
        return between.join(words)


A1111 = Reading()
