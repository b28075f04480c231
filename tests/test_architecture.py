"""Who may import whom, and how large a file may grow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "imaged"
NOUNS = {
    "params",
    "jobs",
    "errors",
    "settings",
    "catalogue",
    "offers",
    "aliases",
    "infotext",
    "checkpoint",
    "explain",
    "files",
    "prompt",
    "receipts",
    "schedule",
    "schedulers",
    "__version__",
}
MAY_IMPORT = {
    "nouns": NOUNS,
    "cli": {"cli", "client", "gateway", "worker", "engine", "store", *NOUNS},
    "gateway": {"gateway", "store", *NOUNS},
    "worker": {"worker", "store", "engine", *NOUNS},
    "engine": {
        *("engine", "params", "errors", "catalogue", "checkpoint", "files"),
        *("prompt", "schedule", "schedulers", "__version__"),
    },
    "store": {"store", *NOUNS},
    "client": {"client", "params", "errors", "schedulers"},
}
ONLY_ENGINE = {"torch", "tokenizers", "numpy", "safetensors"}
#: What reads a checkpoint's small files without tensors has a library for it.
READERS = {
    ("files.py", "safetensors"),
    ("prompt/embeddings.py", "safetensors"),
    ("prompt/tokenizer.py", "tokenizers"),
}
REFERENCES = {"diffusers", "transformers", "scipy"}  # of the tests, not of the product
LONGEST_FILE, LONGEST_FUNCTION = 420, 45


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "nouns" if first in NOUNS else first


def imports(source: str) -> list[str]:
    """Every module named by an import anywhere in the file, also inside functions."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def breaches(part: str, source: str, name_of_file: str = "") -> list[str]:
    found = []
    for name in imports(source):
        top, _, rest = name.partition(".")
        reads = (name_of_file, top) in READERS
        if top in ONLY_ENGINE and part != "engine" and not reads:
            found.append(f"{part} imports {top}")
        if top in REFERENCES:
            found.append(f"{part} imports {top}, which takes seconds")
        if top == "imaged" and part in MAY_IMPORT:
            target = rest.split(".")[0]
            if target and target not in MAY_IMPORT[part]:
                found.append(f"{part} imports {target}")
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    assert breaches(part_of(path), path.read_text(), str(path.relative_to(PACKAGE))) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("gateway", "from imaged.engine import samplers"),
        ("gateway", "def f():\n    import torch"),
        ("engine", "from imaged.settings import Settings"),
        ("engine", "import imaged.store.queue"),
        ("engine", "from diffusers import AutoencoderKL"),
        ("nouns", "import numpy as np"),
        ("client", "from imaged.store import queue"),
        ("store", "from imaged.gateway.app import build_app"),
    ],
)
def test_planted_breaches_are_seen(part: str, source: str) -> None:
    assert len(breaches(part, source)) == 1


#: The gateway reads rows of jobs through functions that name their owner (decision 15), so it has
#: no table of them; the count of workers that are ready is nobody's.
MAY_SEE_TABLES = {"gateway/ops.py": {"workers"}}


def tables_seen(source: str) -> set[str]:
    """Names of imaged.store.schema that a source imports; the module itself is "*"."""
    prefix = "imaged.store.schema"
    found = {name for name in imports(source) if f"{name}.".startswith(f"{prefix}.")}
    return {name.removeprefix(prefix).removeprefix(".") or "*" for name in found}


@pytest.mark.parametrize("path", sorted((PACKAGE / "gateway").rglob("*.py")), ids=lambda p: p.name)
def test_the_gateway_has_no_table_of_jobs(path: Path) -> None:
    allowed = MAY_SEE_TABLES.get(str(path.relative_to(PACKAGE)), set())
    assert tables_seen(path.read_text()) <= allowed


@pytest.mark.parametrize(
    "planted",
    [
        "from imaged.store.schema import jobs, workers",
        "def f():\n    from imaged.store.schema import jobs as j",
        "from imaged.store import schema",
        "import imaged.store.schema",
        "import imaged.store.schema as tables",
    ],
)
def test_a_handler_that_reads_jobs_itself_is_seen(planted: str) -> None:
    for path, allowed in (("account.py", set[str]()), ("ops.py", {"workers"})):
        source = f"{(PACKAGE / 'gateway' / path).read_text()}\n{planted}\n"
        assert not tables_seen(source) <= allowed


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= LONGEST_FILE
    if "migrations" in path.parts:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, (node.name, length)


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body without the docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    assert node.end_lineno is not None
    return node.end_lineno - body[0].lineno + 1


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("worker/loop.py", ["run"]),
        ("engine/engine.py", ["tick"]),
        ("gateway/images.py", ["submit", "create", "result", "poll", "cancel"]),
    ],
)
def test_tables_of_contents_are_short(file: str, names: list[str]) -> None:
    tree = ast.parse((PACKAGE / file).read_text())
    functions = {
        node.name: node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    for name in names:
        assert body_lines(functions[name]) <= 15, name


def test_one_sqlite_in_a_process() -> None:
    """Two builds of SQLite that have the same file open in one process drop each other's locks, and
    one of them may be left with a log that is deleted.
    """
    own = (path for part in ("imaged", "tests", "bench") for path in (ROOT / part).rglob("*.py"))
    assert not [path for path in own if "sqlite3" in imports(path.read_text())]


def test_no_catch_all_files() -> None:
    banned = {"utils.py", "helpers.py", "common.py", "base.py", "manager.py"}
    assert not [path for path in SOURCES if path.name in banned]


def test_nothing_is_too_large() -> None:
    limit = 20 * 1024 * 1024
    checkpoint = sum(p.stat().st_size for p in (PACKAGE / "checkpoints").rglob("*") if p.is_file())
    assert checkpoint <= limit
