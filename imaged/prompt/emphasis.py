"""Emphasis in the A1111 dialect: `(x)` `(x:1.3)` `[x]`, nested, with backslash escapes.

Round brackets multiply the weight of what they hold by 1.1 or by the number before the closing
bracket; square ones divide by 1.1. A bracket that is never closed holds to the end, one that
was never opened is plain text; a backslash before anything else is dropped. The number belongs
to the whole bracket, so `(a:0.5, b:0.7)` reads `a:0.5, b` at 0.7.

The word BREAK, in capitals, ends a window of the text encoders, also within brackets, where the
reference reads it as a word.
"""

from __future__ import annotations

import re
from itertools import groupby

Span = tuple[str, float]  # a piece of text and its weight; BREAK is no text

BREAK = "BREAK"

UP, DOWN = 1.1, 1 / 1.1
MAX_WEIGHT = 100.0  # a weight beyond it, up or down, is cut to it: the picture is lost long before
MAX_DEPTH = 64  # brackets within brackets beyond it are plain text, so that parsing takes no time
_TOKEN = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<weight>:\s*(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\))"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<lone>\\)"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)
_BREAK = re.compile(r"\b(BREAK)\b")


def parse(prompt: str) -> list[Span]:
    """The prompt's pieces with their weights, in order; neighbours of equal weight are one."""
    events, factors = _events(prompt)
    pieces: list[Span] = []
    products = {"(": [1.0], "[": [1.0]}  # of the brackets that are open, the outermost first
    for event in events:
        if isinstance(event, str):
            weight = products["("][-1] * products["["][-1]
            pieces.append((event, max(-MAX_WEIGHT, min(MAX_WEIGHT, weight))))
            continue
        kind, factor = factors[event if event >= 0 else ~event]
        if event >= 0:
            products[kind].append(products[kind][-1] * factor)
        else:
            products[kind].pop()
    return _join(pieces)


def _events(prompt: str) -> tuple[list[str | int], list[tuple[str, float]]]:
    """Texts, and brackets by their number: n where it opens and ~n where it closes; and of each
    bracket its kind and what it multiplies by.
    """
    events: list[str | int] = []
    factors: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for token in _TOKEN.finditer(prompt):
        mark = token["bracket"]
        if token["weight"] and opened["("]:
            number = opened["("].pop()
            factors[number] = ("(", max(-MAX_WEIGHT, min(MAX_WEIGHT, float(token["number"]))))
            events.append(~number)
        elif mark in ("(", "[") and len(opened[mark]) < MAX_DEPTH:
            opened[mark].append(len(factors))
            events.append(len(factors))
            factors.append((mark, UP if mark == "(" else DOWN))
        elif mark == ")" and opened["("]:
            events.append(~opened["("].pop())
        elif mark == "]" and opened["["]:
            events.append(~opened["["].pop())
        elif token["escaped"]:
            events.append(token["escaped"])
        elif not token["lone"]:
            events += _broken(token[0])
    return events, factors


def _broken(text: str) -> list[str]:
    """The text with its BREAKs by themselves, and without the spaces around them."""
    parts = _BREAK.split(text)
    last = len(parts) - 1
    for n in range(0, len(parts), 2):
        parts[n] = parts[n].lstrip() if n > 0 else parts[n]
        parts[n] = parts[n].rstrip() if n < last else parts[n]
    return parts


def _join(pieces: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for (weight, _), group in groupby(pieces, lambda piece: (piece[1], piece[0] == BREAK)):
        texts = [text for text, _ in group]
        joined += [(text, weight) for text in (texts if texts[0] == BREAK else ["".join(texts)])]
    return joined or [("", 1.0)]
