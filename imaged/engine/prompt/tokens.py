"""Weighted text to windows of 75 tokens, as CLIP reads them: start, 75 tokens, end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from imaged.engine.prompt.grammar import parse
from imaged.engine.prompt.tokenizer import Tokenizer

WINDOW = 75


@dataclass(frozen=True)
class Windows:
    """A prompt for one text encoder.

    ids:     one list of 77 token ids a window.
    weights: the same shape; start, end and padding weigh 1.
    """

    ids: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]


def read_windows(prompt: str, tokenizer: Tokenizer) -> Windows:
    """Parse the emphasis, tokenise each piece and cut the whole into windows.

    Every piece is tokenised on its own, so a word never joins across a change of weight. An empty
    prompt is one empty window.
    """
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in parse(prompt):
        piece = tokenizer.ids(text)
        ids += piece
        weights += [weight] * len(piece)
    starts = range(0, max(len(ids), 1), WINDOW)
    start, end, pad = tokenizer.start, tokenizer.end, tokenizer.pad
    return Windows(
        tuple(_window(ids[s : s + WINDOW], start, end, pad) for s in starts),
        tuple(_window(weights[s : s + WINDOW], 1.0, 1.0, 1.0) for s in starts),
    )


def _window(body: list[Any], start: Any, end: Any, pad: Any) -> tuple[Any, ...]:
    return (start, *body, end, *[pad] * (WINDOW - len(body)))
