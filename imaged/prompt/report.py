"""A report of how a prompt is read: tokens, weights, windows, unusual characters."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NotRequired, TypedDict

from imaged.prompt import Prompt, compel
from imaged.prompt.a1111 import BREAK
from imaged.prompt.embeddings import Embeddings
from imaged.prompt.tokenizer import Tokenizer
from imaged.prompt.windows import MAX_WINDOWS, WINDOW, Token, cut

MAX_REPORTED_CHARACTERS = 20_000  # characters of the texts that a prompt is over its steps
MAX_UNUSUAL_CHARACTERS = 100  # unusual ones that are told of
SYNTAX = "()[]:|\\"


Piece = TypedDict("Piece", {"text": str, "weight": float, "break": bool}, total=False)


class Window(TypedDict):
    tokens: list[str]
    weights: list[float]


class Encoder(TypedDict):
    """What one text encoder gets; tokens: how many."""

    tokens: int
    windows: list[Window]


class Text(TypedDict):
    """One text of a prompt; steps: as [first, last]. The last three: of the dialect compel."""

    steps: list[list[int]]
    pieces: list[Piece]
    windows: int
    encoders: list[Encoder]
    kind: NotRequired[str]
    weights: NotRequired[list[float]]
    passes: NotRequired[int]


class Inversions(TypedDict):
    """Textual inversions: vectors of those that are there, and words that look like one."""

    found: dict[str, int]
    missing: list[str]


class Character(TypedDict):
    character: str
    code_point: str
    name: str
    count: int
    read_as: str


class Report(TypedDict):
    """How one prompt is read; left_out: texts that are not told."""

    dialect: str
    emphasis: str
    windows: int
    texts: list[Text]
    left_out: int
    embeddings: Inversions
    characters: list[Character]


class Reports(TypedDict):
    """Of both prompts of a request."""

    prompt: Report
    negative_prompt: Report | None


@dataclass(frozen=True)
class Reader:
    """Reads texts as one checkpoint's two text encoders do."""

    tokenizers: tuple[Tokenizer, Tokenizer]
    embeddings: Embeddings

    def report(self, prompt: Prompt) -> Report:
        """What a prompt says at which steps, in what tokens with what weights; the names of
        textual inversions that were found, and those that look like one and are none; and what
        became of characters that are not plain ASCII. Takes time: use a thread.
        """
        self.embeddings.refresh()
        at: dict[str, list[int]] = {}
        for step, text in enumerate(prompt.by_step, start=1):
            at.setdefault(text, []).append(step)
        lengths = accumulate(map(len, at))
        tell = self._by_compel if prompt.reading.dialect == "compel" else self._text
        told = [
            tell(prompt, text, steps)
            for (text, steps), length in zip(at.items(), lengths, strict=True)
            if length <= max(MAX_REPORTED_CHARACTERS, len(text))
        ]
        plain, reading = " ".join(map(prompt.plain, at)), prompt.reading
        found = {p.name: p.vectors for p in self.embeddings.split(plain) if not isinstance(p, str)}
        return {
            "dialect": reading.dialect,
            "emphasis": "compel" if reading.dialect == "compel" else reading.emphasis,
            "windows": max(text["windows"] for text in told),
            "texts": told,
            "left_out": len(at) - len(told),
            "embeddings": {"found": found, "missing": self.embeddings.missing(plain)},
            "characters": self._characters(prompt.text),
        }

    def _text(self, prompt: Prompt, text: str, steps: list[int]) -> Text:
        spans = prompt.spans[text]
        bodies = [cut(spans, tokenizer, self.embeddings) for tokenizer in self.tokenizers]
        return {
            "steps": _ranges(steps),
            "pieces": [
                {"break": True} if piece == BREAK else {"text": piece, "weight": round(weight, 4)}
                for piece, weight in spans
            ],
            "windows": max(map(len, bodies)),
            "encoders": [
                _encoder(windows, tokenizer)
                for windows, tokenizer in zip(bodies, self.tokenizers, strict=True)
            ],
        }

    def _by_compel(self, prompt: Prompt, _: str, steps: list[int]) -> Text:
        """The same in its dialect: `weights` of the parts, which a "blend" mixes and an "and" puts
        side by side, and `passes` through a text encoder.
        """
        structure = prompt.structure
        pieces, sides = list[Piece](), [list[list[Token]](), list[list[Token]]()]
        passes = 0
        for part in structure.parts:
            pieces += [{"break": True}] if pieces else []
            pieces += [{"text": t, "weight": round(w, 4)} for t, w in part.spans]
            for side, tokenizer in zip(sides, self.tokenizers, strict=True):
                spans = [(f"{t} ", w) for t, w in part.spans]  # so that no piece is a BREAK
                whole = [t for body in cut(spans, tokenizer, self.embeddings) for t in body]
                lengths = compel.windows([_written(t, tokenizer) for t in whole], WINDOW)
                ends = list(accumulate(lengths))
                side += [whole[end - n : end] for n, end in zip(lengths, ends, strict=True)]
            passes += part.passes(len(lengths))
        return {
            "steps": _ranges(steps),
            "pieces": pieces,
            "windows": max(map(len, sides)),
            "encoders": [_encoder(s, t) for s, t in zip(sides, self.tokenizers, strict=True)],
            "kind": structure.kind,
            "weights": [part.weight for part in structure.parts],
            "passes": passes,
        }

    def _characters(self, prompt: str) -> list[Character]:
        """Characters that are not plain ASCII, the most frequent first."""
        unusual = Counter(c for c in prompt if not " " <= c <= "~")
        return [
            {
                "character": c,
                "code_point": f"U+{ord(c):04X}",
                "name": unicodedata.name(c, "a control character"),
                "count": count,
                "read_as": _became(c, self.tokenizers[0]),
            }
            for c, count in unusual.most_common(MAX_UNUSUAL_CHARACTERS)
        ]


def problems(name: str, report: Report) -> list[str]:
    """Warnings about how the field `name` was read."""
    found = []
    windows, missing = report["windows"], report["embeddings"]["missing"]
    if windows > MAX_WINDOWS:
        found.append(
            f"{name} is too long: it takes {windows} windows of {WINDOW} tokens and may take "
            f"{MAX_WINDOWS}; the request would fail"
        )
    elif windows > 1:
        found.append(f"{name} is read in {windows} windows of {WINDOW} tokens; nothing is cut")
    passes = max(text.get("passes", 0) for text in report["texts"])
    if passes > compel.MAX_PASSES:
        found.append(
            f"{name} takes {passes} passes of the text encoders, one for each window and each "
            f"weight below 1 in it, and may take {compel.MAX_PASSES}; the request would fail"
        )
    if report["left_out"]:
        found.append(f"{name} says {report['left_out']} more texts, which are not told here")
    if missing:
        words = ", ".join(missing[:20])
        found.append(f"{name} has words that look like textual inversions and are none: {words}")
    for c in report["characters"]:
        if unicodedata.normalize("NFKC", c["character"]) in SYNTAX:
            found.append(f"{name} has {c['name']}, which is text and does not change a weight")
    return found


def _encoder(windows: Sequence[Sequence[Token]], tokenizer: Tokenizer) -> Encoder:
    return {
        "tokens": sum(map(len, windows)),
        "windows": [
            {
                "tokens": [_shown(token, tokenizer) for token in window],
                "weights": [round(token.weight, 4) for token in window],
            }
            for window in windows[:MAX_WINDOWS]
        ],
    }


def _written(token: Token, tokenizer: Tokenizer) -> str:
    return "</w>" if token.embedding is not None else tokenizer.text(token.id)


def _shown(token: Token, tokenizer: Tokenizer) -> str:
    if token.embedding is None:
        return tokenizer.text(token.id)
    return f"<{token.embedding.name}, vector {token.vector + 1} of {len(token.embedding)}>"


def _became(character: str, tokenizer: Tokenizer) -> str:
    """What the text encoders get of it."""
    tokens = [tokenizer.text(id) for id in tokenizer.ids(character)]
    if not tokens:
        return "a space" if character.isspace() else "nothing"
    return " ".join(tokens)


def _ranges(steps: Sequence[int]) -> list[list[int]]:
    """Runs of steps as [first, last]; steps rise."""
    found: list[list[int]] = []
    for step in steps:
        if found and found[-1][1] == step - 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    return found
