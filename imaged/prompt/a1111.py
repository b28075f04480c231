"""Prompts as A1111's web UI reads them: edits from step to step, then emphasis in each step's text.

Edits. `[a:b:0.5]` is a for the first half of the steps and then b, `[a:b:12]` for the first twelve;
`[b:12]` comes after twelve steps and `[a::12]` leaves then. `[a|b]` is a in the first step, b in
the second, a in the third. They nest, in themselves and in emphasis. A number with a point is a
share of the steps; the others count them.

Brackets that are none of these, nor emphasis, are text. A prompt with a bar that is in no
alternation, or with a backslash that escapes nothing, is text as a whole: so it is in the
reference, whose grammar has no place for them.

Emphasis. `(x)` `(x:1.3)` `[x]`, nested, with backslash escapes. Round brackets multiply the weight
of what they hold by 1.1 or by the number before the closing bracket; square ones divide by 1.1. A
bracket that is never closed holds to the end, one that was never opened is plain text; a backslash
before anything else is dropped. The number belongs to the whole bracket, so `(a:0.5, b:0.7)` reads
`a:0.5, b` at 0.7. The word BREAK, in capitals, ends a window of the text encoders, also within
brackets, where the reference reads it as a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TypeAlias

MAX_DEPTH = 64  # edits, and brackets, within one another; what is deeper is text
MAX_EDITS = 128  # of one prompt; one with more is text

_EDIT_TOKEN = re.compile(r"(?:[^\\\[\]():|]|\\.)+|[\[\]():|]")
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d{1,3})?)\s*")


@dataclass(frozen=True)
class Switch:
    """`before` up to and including step `when`, a number or share as written, then `after`."""

    before: tuple[Part, ...]
    after: tuple[Part, ...]
    when: str
    depth: int


@dataclass(frozen=True)
class Alternation:
    """One option a step, in turn."""

    options: tuple[tuple[Part, ...], ...]
    depth: int


Part: TypeAlias = str | Switch | Alternation


@dataclass
class _Bracket:
    """One that is open: where in the parts it stands, and the colons and bars directly in it."""

    at: int
    marks: list[int]


def texts(prompt: str, steps: int) -> list[str]:
    """What the prompt says at each of the steps, in the order of the steps."""
    parts = edits(prompt)
    if all(isinstance(part, str) for part in parts):
        return [prompt] * steps
    alternates = any(_alternates(part) for part in parts)
    changes = (
        set(range(1, steps + 1)) if alternates else {1, *(w + 1 for w in _whens(parts, steps))}
    )
    said: list[str] = []
    for step in range(1, steps + 1):
        said.append(_at(parts, step, steps) if step in changes else said[-1])
    return said


def edits(prompt: str) -> tuple[Part, ...]:
    """The prompt's parts; a prompt without edits is one text."""
    parts: list[Part] = []
    opened: list[_Bracket] = []
    end = bars = count = 0
    for token in _EDIT_TOKEN.finditer(prompt):
        if token.start() != end:
            return (prompt,)
        end, mark = token.end(), token[0]
        if mark in ("[", "("):
            opened.append(_Bracket(len(parts), []))
        elif mark in (":", "|") and opened:
            opened[-1].marks.append(len(parts))
        parts.append(mark)
        bars += mark == "|"
        if mark in ("]", ")"):
            found = _close(parts, opened, mark)
            if isinstance(found, Alternation):
                bars -= len(found.options) - 1
            count += found is not None
            if count > MAX_EDITS:
                return (prompt,)
    return _joined(parts) if end == len(prompt) and not bars else (prompt,)


def _close(parts: list[Part], opened: list[_Bracket], mark: str) -> Switch | Alternation | None:
    """Make an edit of what the innermost bracket holds, if it is one.

    A bracket that matches no form makes the brackets around it text too.
    """
    bracket = opened.pop() if opened else None
    if bracket is None or parts[bracket.at] != ("[" if mark == "]" else "("):
        opened.clear()
        return None
    marks = [parts[at] for at in bracket.marks]
    if mark == ")":
        if marks not in ([], [":"]):
            opened.clear()
        return None
    if not marks:
        return None  # emphasis
    ends = [bracket.at, *bracket.marks, len(parts) - 1]
    pieces = [_joined(parts[a + 1 : b]) for a, b in pairwise(ends)]
    depth = 1 + max((p.depth for p in parts[bracket.at :] if not isinstance(p, str)), default=0)
    found = _edit(marks, pieces, depth) if depth <= MAX_DEPTH else None
    if found is None:
        opened.clear()
    else:
        parts[bracket.at :] = [found]
    return found


def _edit(
    marks: Sequence[Part], pieces: list[tuple[Part, ...]], depth: int
) -> Switch | Alternation | None:
    if set(marks) == {"|"}:
        return Alternation(tuple(pieces), depth)
    [*said, last] = pieces
    number = _NUMBER.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
    if number is None or len(said) > 2 or set(marks) != {":"}:
        return None
    return Switch(said[0] if len(said) == 2 else (), said[-1], number[1], depth)


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Merge neighbouring parts that are text."""
    joined: list[Part] = []
    for plain, group in groupby(parts, lambda part: isinstance(part, str)):
        found = list(group)
        joined += ["".join(map(str, found))] if plain else found
    return tuple(joined)


def _alternates(part: Part) -> bool:
    if isinstance(part, Switch):
        return any(map(_alternates, (*part.before, *part.after)))
    return isinstance(part, Alternation)


def _whens(parts: Sequence[Part], steps: int) -> set[int]:
    """The steps after which something changes."""
    found = set()
    for part in parts:
        if isinstance(part, Switch):
            found |= {_when(part, steps)} | _whens((*part.before, *part.after), steps)
    return found


def _when(switch: Switch, steps: int) -> int:
    number = float(switch.when) * (steps if "." in switch.when else 1)
    return int(min(max(number, -1), steps)) if math.isfinite(number) else steps


def _at(parts: Sequence[Part], step: int, steps: int) -> str:
    said = []
    for part in parts:
        if isinstance(part, str):
            said.append(part)
        elif isinstance(part, Alternation):
            said.append(_at(part.options[(step - 1) % len(part.options)], step, steps))
        else:
            side = part.before if step <= _when(part, steps) else part.after
            said.append(_at(side, step, steps))
    return "".join(said)


# -- emphasis -------------------------------------------------------------------------------

Span = tuple[str, float]  # a piece of text and its weight; BREAK is no text

BREAK = "BREAK"

UP, DOWN = 1.1, 1 / 1.1
MAX_WEIGHT = 100.0  # a weight beyond it, up or down, is cut to it: the picture is lost long before
_EMPHASIS_TOKEN = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<weight>:\s*(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\))"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<lone>\\)"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)
_BREAK = re.compile(r"\b(BREAK)\b")


def spans(prompt: str) -> list[Span]:
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
    for token in _EMPHASIS_TOKEN.finditer(prompt):
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
