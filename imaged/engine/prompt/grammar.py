"""Emphasis in the A1111 dialect: `(x)` `(x:1.3)` `[x]`, nested, with backslash escapes.

Round brackets multiply the weight of what they hold by 1.1 or by the number before the closing
bracket; square ones divide by 1.1. A bracket that is never closed holds to the end, one that
was never opened is plain text; a backslash before anything else is dropped. The number belongs
to the whole bracket, so `(a:0.5, b:0.7)` reads `a:0.5, b` at 0.7.
"""

from __future__ import annotations

import re

Span = tuple[str, float]  # a piece of text and its weight

UP, DOWN = 1.1, 1 / 1.1
MOST = 100.0  # a weight beyond it, up or down, is cut to it: the picture is lost long before
DEEPEST = 64  # brackets within brackets beyond it are plain text, so that parsing takes no time
_TOKEN = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<weight>:\s*(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\))"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<lone>\\)"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)


def parse(prompt: str) -> list[Span]:
    """The prompt's pieces with their weights, in order; neighbours of equal weight are one."""
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for token in _TOKEN.finditer(prompt):
        bracket = token["bracket"]
        if token["weight"] and opened["("]:
            _scale(pieces, opened["("].pop(), float(token["number"]))
        elif bracket in ("(", "[") and len(opened[bracket]) < DEEPEST:
            opened[bracket].append(len(pieces))
        elif bracket == ")" and opened["("]:
            _scale(pieces, opened["("].pop(), UP)
        elif bracket == "]" and opened["["]:
            _scale(pieces, opened["["].pop(), DOWN)
        elif not token["lone"]:
            pieces.append((token["escaped"] or token[0], 1.0))
    for start in opened["("]:
        _scale(pieces, start, UP)
    for start in opened["["]:
        _scale(pieces, start, DOWN)
    return _join(pieces)


def _scale(pieces: list[Span], start: int, factor: float) -> None:
    pieces[start:] = [
        (text, max(-MOST, min(MOST, weight * factor))) for text, weight in pieces[start:]
    ]


def _join(pieces: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]
