"""Weighted text to windows of 75 tokens, as CLIP reads them: start, 75 tokens, end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from imaged.engine.prompt.embeddings import Embedding, Embeddings
from imaged.engine.prompt.grammar import parse
from imaged.engine.prompt.tokenizer import Tokenizer

WINDOW = 75
ANY = 0  # the id where a vector stands: any that does not end the text
NONE = Embeddings(None, (0, 0))


@dataclass(frozen=True)
class Windows:
    """A prompt for one text encoder.

    ids:      one list of 77 token ids a window.
    weights:  the same shape; start, end and padding weigh 1.
    embedded: (window, place, embedding, which of its vectors) where a vector stands for a token.
    """

    ids: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    embedded: tuple[tuple[int, int, Embedding, int], ...] = ()


def read_windows(prompt: str, tokenizer: Tokenizer, embeddings: Embeddings = NONE) -> Windows:
    """Parse the emphasis, tokenise each piece and cut the whole into windows.

    Every piece is tokenised on its own, so a word never joins across a change of weight. An
    embedding is not cut: where it does not fit a new window begins. An empty prompt is one empty
    window.
    """
    bodies: list[list[tuple[int, float]]] = [[]]
    embedded = []
    for text, weight in parse(prompt):
        for piece in embeddings.split(text):
            if isinstance(piece, Embedding):
                if len(bodies[-1]) + len(piece) > WINDOW:
                    bodies.append([])
                at = 1 + len(bodies[-1])
                embedded += [(len(bodies) - 1, at + n, piece, n) for n in range(len(piece))]
                bodies[-1] += [(ANY, weight)] * len(piece)
                continue
            for token in tokenizer.ids(piece):
                if len(bodies[-1]) == WINDOW:
                    bodies.append([])
                bodies[-1].append((token, weight))
    start, end, pad = tokenizer.start, tokenizer.end, tokenizer.pad
    return Windows(
        tuple(_window([token for token, _ in body], start, end, pad) for body in bodies),
        tuple(_window([weight for _, weight in body], 1.0, 1.0, 1.0) for body in bodies),
        tuple(embedded),
    )


def _window(body: list[Any], start: Any, end: Any, pad: Any) -> tuple[Any, ...]:
    return (start, *body, end, *[pad] * (WINDOW - len(body)))
