"""The dialect of the package compel: `word++`, `(some words)1.3`, `("a", "b").and()`, `.blend()`.

A plus multiplies a weight by 1.1, a minus by 0.9; a number behind brackets or quotes is the weight.
Brackets nest, and a backslash takes a character for itself. What that package's own parser makes
of text that is not well-formed is not repeated here: it is refused by name. That parser takes four
times as long with every nested bracket; this one reads a text once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from imaged.errors import BadParameter
from imaged.prompt.a1111 import MAX_WEIGHT, Span

PLUS, MINUS = 1.1, 0.9
MAX_PASSES = 64  # of windows through a text encoder, for one text
MIN_SUM = 0.01  # of the numbers of a blend, by which they are divided
MAX_PARTS, MAX_SPANS, MAX_DEPTH = 8, 64, 64
_OPERATOR = re.compile(r"\.\s*(and|add|blend)\s*\(([^()]*)\)$")
_REFUSED = re.compile(r"\.(swap|attend)\s*\(|\b(useLora|withLora)\s*\(")
_WEIGHT = re.compile(r"\++|-+|\d+\.\d*|\.\d+|\d+")
_SIGNS = re.compile(r"\++|-+")
_NUMBER = re.compile(r"-?(?:\d{1,4}(?:\.\d{0,9})?|\.\d{1,9})")
_WORD = re.compile(r'(?:\\.|[+-](?=[^\s()",.+=-])|[^\s()",.+=\\-])+', re.DOTALL)
_BARE, _ONE = re.compile(r"\S+"), re.compile(r"\S")  # outside of brackets, and within
_MARKS = re.compile(r'(?<=[)"])(?:[+-]+|\d+\.?\d*|\.\d+)|[()"\\]|(?<=\S)[+-]+(?=[\s(),.]|$)')
PHRASE_ENDS = (".</w>", ",</w>", ";</w>", ":</w>")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """A text in pieces of one weight each, and how much it counts beside others."""

    spans: tuple[Span, ...]
    weight: float = 1.0

    def passes(self, windows: int) -> int:
        """How often windows go through a text encoder: once, and again for each weight below 1."""
        return windows * (1 + sum(weight < 1 for _, weight in self.spans))


@dataclass(frozen=True)
class Structure:
    """One part, or several that stand one after the other ("and") or are mixed ("blend")."""

    parts: tuple[Part, ...]
    kind: str = "and"
    normalized: bool = True  # whether the weights of a blend are made to sum to one


def parse(text: str) -> Structure:
    """Raises BadParameter for what is not well-formed, and for what is not served."""
    text = text.rstrip()
    if found := _REFUSED.search(text):
        raise _wrong(f"should not have {found[0].strip('.( ')} in it, which is not served")
    operator = _OPERATOR.search(text)
    if operator is None:
        return Structure((Part(_spans(text, bare=True)),))
    kind = operator[1].replace("add", "and")
    target = text[: operator.start()].strip()
    if not (target.startswith("(") and target.endswith(")")):
        raise _wrong(f"should have brackets around what .{operator[1]}() is said of")
    texts = _split(target[1:-1])
    weights, normalized = _weights(operator[2], len(texts), kind)
    parts = zip(texts, weights, strict=True)
    return Structure(tuple(Part(_spans(t), weight) for t, weight in parts), kind, normalized)


def _weights(said: str, count: int, kind: str) -> tuple[list[float], bool]:
    """The numbers of an operator, and whether they are made to sum to one."""
    words = [word.strip() for word in said.split(",") if word.strip()]
    normalized = not (kind == "blend" and words[-1:] == ["no_normalize"])
    words = words if normalized else words[:-1]
    if not all(map(_NUMBER.fullmatch, words)) or len(words) not in (0, count):
        raise _wrong(f"should have no number or {count} of them in .{kind}()")
    weights = [float(word) for word in words] or [1.0] * count
    if any(abs(weight) > MAX_WEIGHT for weight in weights):
        most = f"{MAX_WEIGHT:.0f}"
        raise _wrong(f"should have numbers between -{most} and {most} in .{kind}()")
    if kind == "blend" and normalized and abs(sum(weights)) < MIN_SUM:
        raise _wrong("should have numbers in .blend() that do not cancel out, or no_normalize")
    return weights, normalized


def _split(inside: str) -> list[str]:
    """The texts between commas that are in no brackets and no quotes; their own quotes go."""
    texts, depth, quoted, begin, at = list[str](), 0, False, 0, 0
    while at < len(inside):
        c = inside[at]
        if c == "\\":
            at += 1
        elif c == '"':
            quoted = not quoted
        elif not quoted and c in "()":
            depth += 1 if c == "(" else -1
        elif c == "," and not quoted and not depth:
            texts.append(inside[begin:at])
            begin = at + 1
        at += 1
    texts.append(inside[begin:])
    if len(texts) > MAX_PARTS:
        raise _wrong(f"should have at most {MAX_PARTS} parts")
    return [re.sub(r'^"(.*)"$', r"\1", text.strip(), flags=re.DOTALL) for text in texts]


def _spans(text: str, *, bare: bool = False) -> tuple[Span, ...]:
    """Pieces with their weights; neighbours of equal weight are one.

    bare: outside of brackets a word without weight is all up to the next white space.
    """
    text = re.sub(r",(\S)", r", \1", text)
    # One list for each bracket or quote that is open, the outermost first: what it holds so far.
    levels: list[tuple[str, list[Span]]] = [("", [])]
    at = 0
    while at < len(text):
        c = text[at]
        if c == "(" or (c == '"' and levels[-1][0] != '"'):
            levels.append((c, []))
            if len(levels) > MAX_DEPTH:
                raise _wrong(f"should not have more than {MAX_DEPTH} brackets open")
            at += 1
        elif c in ')"':
            if levels[-1][0] != ("(" if c == ")" else '"'):
                raise _wrong(f"should have an opening bracket or quote for the {c} at {at + 1}")
            _, held = levels.pop()
            weight, at = _weight(text, at + 1, _WEIGHT)
            levels[-1][1].extend((piece, factor * weight) for piece, factor in held)
        elif c.isspace():
            at += 1
        else:
            as_it_stands = bare and len(levels) == 1
            word = _WORD.match(text, at)
            signs = _SIGNS.match(text, word.end()) if word else None
            if word is None or (as_it_stands and signs is None):
                word = _BARE.match(text, at) if as_it_stands else _ONE.match(text, at)
            assert word is not None
            weight, at = _weight(text, word.end(), _SIGNS) if signs else (1.0, word.end())
            levels[-1][1].append((_ESCAPED.sub(r"\1", word[0]), weight))
    if len(levels) > 1:
        raise _wrong("should close every bracket and quote")
    return _joined(levels[0][1])


def _weight(text: str, at: int, form: re.Pattern[str]) -> tuple[float, int]:
    """A weight that stands at this place, and where what follows begins."""
    found = form.match(text, at)
    if found is None:
        return 1.0, at
    said = found[0]
    if said[0] in "+-":
        base = PLUS if said[0] == "+" else MINUS
        return min(base ** min(len(said), 1000), MAX_WEIGHT), found.end()
    return min(float(said), MAX_WEIGHT), found.end()


def _joined(pieces: list[Span]) -> tuple[Span, ...]:
    """Neighbours of equal weight with a space between, and no weight beyond MAX_WEIGHT."""
    joined: list[Span] = []
    for text, weight in pieces:
        weight = min(weight, MAX_WEIGHT)
        if joined and joined[-1][1] == weight:
            joined[-1] = (f"{joined[-1][0]} {text}", weight)
        else:
            joined.append((text, weight))
    if len(joined) > MAX_SPANS:
        raise _wrong(f"should have at most {MAX_SPANS} pieces of different weight")
    return tuple(joined) or (("", 1.0),)


def _wrong(problem: str) -> BadParameter:
    return BadParameter("prompt", f"in the dialect compel {problem}")


def unmarked(text: str) -> str:
    """The text without its marks, and with the white space that is in it."""
    return _MARKS.sub("", text)


def windows(tokens: Sequence[str], most: int) -> list[int]:
    """Lengths of the windows that the package cuts a part into, each after the last sentence that
    ends in it, else the last phrase, else the last word.
    """
    lengths, rest = list[int](), list(tokens)
    while len(rest) > most:
        inside = rest[:most]
        ends = (
            [n for n, token in enumerate(inside) if token == ".</w>"],
            [n for n, token in enumerate(inside) if token in PHRASE_ENDS],
            [n for n, token in enumerate(inside) if token.endswith("</w>")],
        )
        length = next((found[-1] + 1 for found in ends if found), most)
        lengths.append(length)
        rest = rest[length:]
    return [*lengths, len(rest)]
