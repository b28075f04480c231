"""Textual inversion: words that stand for vectors of their own, from files of their names.

Gal et al. 2022. A file for SDXL holds `clip_l` (vectors, first width) and `clip_g` (vectors, second
width). In a prompt its name, in any case and as a word, is replaced by that many tokens; a name
without a file is a word like any other.
"""

from __future__ import annotations

import logging
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from imaged.errors import CheckpointRefused
from imaged.weight_files import Header

log = logging.getLogger(__name__)

KEYS = ("clip_l", "clip_g")  # for the first encoder and the second
MAX_VECTORS = 75  # what fits into a window
MAX_NAME_LENGTH = 100  # characters
Widths = tuple[int, int]  # of the two text encoders
#: What a name of such a file looks like, and a word of English does not: bad_hands-5, EasyNegative.
LIKE_A_NAME = re.compile(r"(?=.*[^\W\d_])(?:.*[^\W_]_.*|.*[a-z][A-Z].*|[^\W\d_]{2,}.*\d.*)")
_WORD = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Embedding:
    """A file by its name, and how many vectors it has for each of the two encoders."""

    name: str
    vectors: int

    def __len__(self) -> int:
        return self.vectors


def read_embedding(path: Path, widths: Widths) -> Embedding:
    """Raises CheckpointRefused for a file that does not suit these encoders."""
    shapes = Header.read(path).shapes
    if not set(KEYS) <= shapes.keys():
        raise CheckpointRefused(f"{path.name} is no textual inversion of SDXL ({', '.join(KEYS)})")
    found = [shapes[key] for key in KEYS]
    count = found[0][0] if found[0] else 0
    if found != [(count, width) for width in widths]:
        raise CheckpointRefused(f"{path.name} is a textual inversion for other text encoders")
    if not 1 <= count <= MAX_VECTORS:
        raise CheckpointRefused(f"{path.name} should have between 1 and {MAX_VECTORS} vectors")
    return Embedding(path.stem, count)


class Embeddings:
    """The files of a folder that suit a checkpoint's two text encoders, each as `read` has it."""

    def __init__(
        self,
        folder: Path | None,
        widths: Widths,
        read: Callable[[Path, Widths], Embedding] = read_embedding,
    ) -> None:
        self._folder, self._widths, self._read = folder, widths, read
        self._found: dict[str, Embedding] = {}
        self._pattern: re.Pattern[str] | None = None
        self.version: tuple[tuple[str, int], ...] = ()  # the files that were read, and when changed

    def refresh(self) -> None:
        """Read what has been put into the folder, or taken from it, since the last time."""
        files = _files(self._folder) if self._folder else {}
        version = tuple((path.name, changed) for path, changed in files.items())
        if version == self.version:
            return
        found = {}
        for path in files:
            try:
                found[path.stem.casefold()] = self._read(path, self._widths)
            except (CheckpointRefused, OSError, SafetensorError) as error:
                log.warning("left out: %s", error)
        names = sorted(map(re.escape, found), key=len, reverse=True)
        pattern = rf"(?<!\w)({'|'.join(names)})(?!\w)" if names else None
        self._pattern = re.compile(pattern, re.IGNORECASE) if pattern else None
        self.version, self._found = version, found

    def split(self, text: str) -> Iterator[str | Embedding]:
        """The text with embeddings in their names' places."""
        at = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if (found := self._found.get(match[0].casefold())) is not None:
                yield text[at : match.start()]
                yield found
                at = match.end()
        yield text[at:]

    def missing(self, text: str) -> list[str]:
        """Words that look like names of such files and are none, so that they are read as words."""
        plain = " ".join(piece for piece in self.split(text) if isinstance(piece, str))
        words = (word.strip(".-") for word in _WORD.findall(plain))
        names = (w for w in words if len(w) <= MAX_NAME_LENGTH and LIKE_A_NAME.fullmatch(w))
        return list(dict.fromkeys(names))


def _files(folder: Path) -> dict[Path, int]:
    """The folder's files, and when each was changed."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            about = path.stat()
        except OSError:  # a link that leads nowhere, or it has just gone
            continue
        if stat.S_ISREG(about.st_mode):
            found[path] = about.st_mtime_ns
    return found
