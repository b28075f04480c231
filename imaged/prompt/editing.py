"""Prompts that change from step to step, in the A1111 dialect.

`[a:b:0.5]` is a for the first half of the steps and then b, `[a:b:12]` for the first twelve;
`[b:12]` comes after twelve steps and `[a::12]` leaves then. `[a|b]` is a in the first step, b in
the second, a in the third. They nest, in themselves and in emphasis. A number with a point is a
share of the steps; the others count them.

Brackets that are none of these, nor emphasis, are text. A prompt with a bar that is in no
alternation, or with a backslash that escapes nothing, is text as a whole: so it is in the
reference, whose grammar has no place for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TypeAlias

MAX_EDITS = 128  # of one prompt; one with more is text
MAX_DEPTH = 64  # edits within edits; what is deeper is text

_TOKEN = re.compile(r"(?:[^\\\[\]():|]|\\.)+|[\[\]():|]")
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
    parts = parse(prompt)
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


def parse(prompt: str) -> tuple[Part, ...]:
    """The prompt's parts; a prompt without edits is one text."""
    parts: list[Part] = []
    opened: list[_Bracket] = []
    end = bars = edits = 0
    for token in _TOKEN.finditer(prompt):
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
            edits += found is not None
            if edits > MAX_EDITS:
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
