"""Normalization of text against disguises: look-alike letters, digits for letters, spacing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

#: Names of Latin letters in other shapes: small capitals, hooks, strokes, white on black, flags.
_LATIN = re.compile(
    r"(?:LATIN (?:SMALL |CAPITAL )?LETTER (?:SMALL CAPITAL )?|REGIONAL INDICATOR SYMBOL LETTER "
    r"|NEGATIVE (?:SQUARED|CIRCLED) LATIN CAPITAL LETTER )([A-Z])(?: WITH .+)?"
)
_LOOKALIKES = str.maketrans("асеорхуіјѕԁһӏкмтвαειοκρτυχνıøł", "aceopxyijsdhlkmtbaeiokptuxviol")
_INVISIBLE = frozenset({"Cf", "Mn", "Me", "Cc"})
_WORD = re.compile(r"\w+")
_LEET_WORD = re.compile(r"[a-z0-9@$!|+€]+")
_LEET = str.maketrans("034578@$+€", "oeastbaste")
_LEET_I, _LEET_L = str.maketrans("1!|", "iii"), str.maketrans("1!|", "lll")
_SPACED = re.compile(r"(?<![\w@$])(?:[a-z0-9@$][\s.,_*/|~-]{1,3}){2,}[a-z0-9@$](?![\w@$])")
_LONG_RUN = re.compile(r"([a-z])\1{2,}")


def fold(text: str) -> str:
    """Lower case, without accents, invisible characters and look-alike letters."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    seen = (c if unicodedata.category(c) not in _INVISIBLE else _gap(c) for c in plain)
    text = "".join(seen)
    return text.translate({ord(c): _latin(c) for c in set(text) if c > "~"}).translate(_LOOKALIKES)


def words(folded: str) -> str:
    """The words of a folded text, with one space before, between and after."""
    return f" {' '.join(_WORD.findall(folded.replace('_', ' ')))} "


def normalized_variants(folded: str) -> list[str]:
    """`words` of the text as it is, then with digits as letters, without repeated letters, and with
    spaced letters joined. Ages are looked for in the first only, where digits are digits.
    """
    plain = words(folded)
    found = {plain: None}
    for ones in (_LEET_I, _LEET_L):
        spelt = " ".join(_unleet(folded, ones))
        apart = " ".join(_joined(folded, ones))
        for text in (spelt, _LONG_RUN.sub(r"\1", spelt), apart):
            found[words(text)] = None
    return list(found)


def _latin(character: str) -> str:
    """The plain letter of a Latin one in another shape, by its name in Unicode; others stay."""
    found = _LATIN.fullmatch(unicodedata.name(character, ""))
    return found[1].lower() if found else character


def _gap(invisible: str) -> str:
    """A space for a control character such as a line break, nothing for other invisible ones."""
    return " " if unicodedata.category(invisible) == "Cc" else ""


def _unleet(folded: str, ones: dict[int, int]) -> Iterator[str]:
    for word in _LEET_WORD.findall(folded):
        yield word.strip("!|+").translate(_LEET).translate(ones)


def _joined(folded: str, ones: dict[int, int]) -> Iterator[str]:
    """Spaced letters as words: `a b c` -> abc."""
    for run in _SPACED.findall(folded):
        letters = "".join(_LEET_WORD.findall(run)).replace("|", "")
        word = letters.translate(_LEET).translate(ones)
        yield f"{word} {word[1:]}" if word.startswith("a") else word  # the article before it
