"""Weighted text to windows of 75 tokens, as CLIP reads them: start, 75 tokens, end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from imaged.prompt.a1111 import BREAK, Span
from imaged.prompt.embeddings import Embedding, Embeddings
from imaged.prompt.tokenizer import Tokenizer

WINDOW = 75
MAX_WINDOWS = 64  # of one text: 4,800 tokens, about 20,000 characters of English
LOOK_BACK = 20  # tokens from the end of a window, within which a comma ends it
ANY = 0  # the id where a vector stands: any that does not end the text
NONE = Embeddings(None, (0, 0))


class Token(NamedTuple):
    """One place of a window; `vector` is the number of it in the embedding."""

    id: int
    weight: float
    embedding: Embedding | None = None
    vector: int = 0


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


def read_windows(
    spans: Sequence[Span], tokenizer: Tokenizer, embeddings: Embeddings = NONE
) -> Windows:
    """What `cut` makes of a text, as the text encoders take it."""
    bodies = cut(spans, tokenizer, embeddings)
    start, end, pad = tokenizer.start, tokenizer.end, tokenizer.pad
    return Windows(
        tuple(_window([token.id for token in body], start, end, pad) for body in bodies),
        tuple(_window([token.weight for token in body], 1.0, 1.0, 1.0) for body in bodies),
        tuple(
            (number, 1 + place, token.embedding, token.vector)
            for number, body in enumerate(bodies)
            for place, token in enumerate(body)
            if token.embedding is not None
        ),
    )


def cut(
    spans: Sequence[Span], tokenizer: Tokenizer, embeddings: Embeddings = NONE
) -> list[list[Token]]:
    """Tokenise each piece of a text and cut the whole into windows of at most 75.

    Every piece is tokenised on its own, so a word never joins across a change of weight. An
    embedding is not cut: where it does not fit a new window begins. A full window ends after its
    last comma, if that is within LOOK_BACK tokens. No text is one empty window.
    """
    bodies: list[list[Token]] = [[]]
    [comma] = tokenizer.ids(",")
    for text, weight in spans:
        if text == BREAK:
            bodies.append([])
            continue
        for piece in embeddings.split(text):
            if isinstance(piece, Embedding):
                if len(bodies[-1]) + len(piece) > WINDOW:
                    bodies.append([])
                bodies[-1] += [Token(ANY, weight, piece, n) for n in range(len(piece))]
                continue
            for token in tokenizer.ids(piece):
                if len(bodies[-1]) == WINDOW:
                    bodies.append([] if token == comma else _clause(bodies[-1], comma))
                bodies[-1].append(Token(token, weight))
    if len(bodies) > 1 and not bodies[-1]:
        bodies.pop()  # nothing follows the last break
    return bodies


def _clause(body: list[Token], comma: int) -> list[Token]:
    """Take what follows the last comma out of a full window, if it is not much."""
    commas = [n for n, token in enumerate(body) if token.id == comma]
    if not commas or len(body) - commas[-1] > LOOK_BACK:
        return []
    moved = body[commas[-1] + 1 :]
    del body[commas[-1] + 1 :]
    return moved


def _window(body: list[Any], start: Any, end: Any, pad: Any) -> tuple[Any, ...]:
    return (start, *body, end, *[pad] * (WINDOW - len(body)))
