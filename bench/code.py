"""Which code a figure is of: a digest of the files that count for it, and their commit."""

from __future__ import annotations

import ast
import hashlib
import io
import subprocess
import tokenize
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
SERVED = {"cli", "client"}
#: Of `cli` also what serves.
SERVING = {"imaged/cli/app.py", "imaged/cli/models.py", "imaged/cli/serve.py"}
CALLED = {"cli", "client", "gateway", "moderation", "provenance", "store", "worker"}
#: Each benchmark, with the folders of `imaged` that do not count for it.
LEFT_OUT = {
    **dict.fromkeys(("single", "crowd", "recovery", "polls", "gpu"), SERVED),  # over HTTP
    **dict.fromkeys(
        ("waiting", "exact", "savings", "full", "bf16"), CALLED
    ),  # the engine is called
    "start": {"client"},
}
#: Parts of `bench` (see `part`) that count for every benchmark, as does each one's own.
SHARED = {"ceiling", "rounds", "sides"}
#: Parts of `bench` that measure nothing.
SHOWING = {"__init__", "__main__", "all", "app", "check", "code", "company", "figures", "report"}
SHOWING |= {"sigmas"}
TOPS = ("imaged", "bench")
PINS, PINNED = "constraints.txt", "torch=="  # of its lines that one
DIGITS = 12
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Code:
    """digest: of the files that count. commit: the one that has them as they are; empty if none."""

    digest: str = ""  # empty: not known
    commit: str = ""

    def __str__(self) -> str:
        return f"{self.digest} {f'of commit {self.commit}' if self.commit else 'not committed'}"


class Tree:
    """A working tree as it was at one time: the digest of every file that may count."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._files = {
            path.relative_to(root).as_posix(): _digest(said(path.read_bytes(), path.suffix))
            for path in self._found()
            if path.is_file() and path.suffix != ".pyc"
        }
        if (root / PINS).exists():
            lines = (root / PINS).read_text().splitlines()
            self._files[PINS] = " ".join(line for line in lines if line.startswith(PINNED))

    def _found(self) -> list[Path]:
        """All files that may count; what git ignores counts no more than it is committed."""
        known = self._names("ls-files", "--cached", "--others", "--exclude-standard")
        if known:
            return sorted(self._root / name for name in known)
        return sorted(path for top in TOPS for path in (self._root / top).rglob("*"))

    def code(self, benchmark: str) -> Code:
        """What a benchmark would measure now."""
        mine = [path for path in self._files if counts(benchmark, path)]
        lines = "".join(f"{path} {self._files[path]}\n" for path in mine)
        changed = [path for path in self._uncommitted if counts(benchmark, path)]
        return Code(_digest(lines.encode()), "" if changed else self._head)

    def stale(self, benchmark: str, code: Code) -> str:
        """What to say of figures of this code; nothing if it is what the tree has."""
        if not code.digest:
            return "measured on older code, it is not known which"
        if code.digest == self.code(benchmark).digest:
            return ""
        changed = [path for path in self._since(code.commit) if counts(benchmark, path)]
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        names = ", ".join(changed[:3]) or "it is not known where"
        return f"measured on code that has changed since: {names}{more}"

    @cached_property
    def _head(self) -> str:
        return self._git("rev-parse", f"--short={DIGITS}", "HEAD").strip()

    @cached_property
    def _uncommitted(self) -> list[str]:
        return self._names("status", "--porcelain", "--untracked-files=all", "--no-renames", cut=3)

    def _since(self, commit: str) -> list[str]:
        return self._names("diff", "--name-only", "--no-renames", commit) if commit else []

    def _names(self, *words: str, cut: int = 0) -> list[str]:
        answer = self._git(*words, "-z", "--", *TOPS, PINS)
        return [name[cut:] for name in answer.split("\0") if name]

    def _git(self, *words: str) -> str:
        """What git says; nothing where there is no git, or this is no repository's root."""
        if not (self._root / ".git").exists():
            return ""
        try:
            done = subprocess.run(
                ["git", *words], cwd=self._root, capture_output=True, text=True, check=False
            )
        except OSError:
            return ""
        return done.stdout if done.returncode == 0 else ""


def counts(benchmark: str, path: str) -> bool:
    """Whether a file's content may change what the benchmark (or a section of it) finds."""
    name = benchmark.split("-")[0]
    if path == PINS:
        return True
    top, *between, file = PurePosixPath(path).parts
    if file.endswith(".md"):
        return False
    if top == "imaged":
        serves = path in SERVING and LEFT_OUT[name] == SERVED
        return serves or not between or between[0] not in LEFT_OUT[name]
    return top == "bench" and part(path) in {*SHARED, name}


def part(path: str) -> str:
    """The part of `bench` that a file is of: the file itself, at the top and in `runs`, where each
    is one benchmark, and elsewhere its folder. No `__init__` holds code.
    """
    _, *folders, file = PurePosixPath(path).parts
    stem = file.removesuffix(".py")
    return stem if folders in ([], ["runs"]) or stem == "__init__" else folders[0]


def said(content: bytes, suffix: str) -> bytes:
    """Of a Python file what is run, without comments, docstrings and blank lines: they
    can be rewritten without measuring anew. Other files are taken whole.
    """
    if suffix != ".py":
        return content
    text = content.decode()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            words = node.body[0]
            assert words.end_lineno is not None
            lines[words.lineno - 1 : words.end_lineno] = [""] * (
                words.end_lineno - words.lineno + 1
            )
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT and lines[row - 1]:
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip()).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]
