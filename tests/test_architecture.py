"""Who may import whom, in what circles nobody may, and how large files and folders may grow."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "imaged"
#: What every part may name: no torch, no network, no database. Lower ones first; one may import
#: those
#: before it.
NOUNS = (
    *("__version__", "errors", "settings", "weight_files", "sampling", "prompt", "params"),
    *("catalogue", "checkpoint_info", "moderation", "provenance", "jobs"),
)
NOUNS_OF_ENGINE = {
    *("__version__", "errors", "weight_files", "sampling", "prompt", "params", "catalogue"),
    "checkpoint_info",
}
#: The parts of imaged, and what each may import beside itself.
PARTS = {
    "cli": {"client", "gateway", "worker", "engine", "store", *NOUNS},
    "gateway": {"store", *NOUNS},
    "worker": {"store", "engine", *NOUNS},
    "engine": NOUNS_OF_ENGINE,
    "store": set(NOUNS),
    "client": {"errors"},
    **{noun: set(NOUNS[:n]) for n, noun in enumerate(NOUNS)},
}
_BELOW_CONTEXT = {"present", "submit", "read", "webhooks", "transport"}
_BELOW_API = {"auth", "context", "submit_and_wait", *_BELOW_CONTEXT}
_ENGINE_BELOW = {"nets", "prompt", "loading", "sampling", "scheduling"}
#: The rooms within a part, folders and single files, likewise.
ROOMS = {
    "gateway": {
        "present": set(),
        "submit": set(),
        "webhooks": {"present"},
        "transport": {"present"},
        "read": {"transport"},
        "context": _BELOW_CONTEXT,
        "auth": {"context"},
        "submit_and_wait": {"context", *_BELOW_CONTEXT},
        "api": _BELOW_API,
        "compat": _BELOW_API,
        "operations": _BELOW_API,
        "openapi": {"api", "compat", "operations", *_BELOW_API},
        "app": {"api", "compat", "operations", "openapi", *_BELOW_API},
        "serve": {"app", "context", "transport"},
    },
    "store": {
        "sql": set(),
        "signing": set(),
        "catalogue": {"sql"},
        "blobs": {"signing"},
        "accounts": {"sql", "signing"},
        "webhooks": {"sql", "signing"},
        "jobs": {"sql", "accounts", "webhooks"},
    },
    "engine": {
        "cpu": set(),
        "out_of_memory": set(),
        "prompt": set(),
        "sampling": set(),
        "nets": {"prompt"},
        "loading": {"nets", "cpu", "out_of_memory"},
        "scheduling": {"nets", "out_of_memory"},
        "plan": {"sampling"},
        "run": {"plan", "prompt", "nets", "loading"},
        "net_variants": {"run", "nets", "loading"},
        "denoise": {"run", "nets"},
        "decode": {"run", "nets"},
        "preview": {"run", "decode", "nets", "out_of_memory"},
        "snapshot": {"run", "loading"},
        "outcome": {"run", "decode", "preview", "snapshot", "out_of_memory"},
        "intake": {"plan", "run", "net_variants", "snapshot", "outcome", "prompt", "loading"},
        "engine": {
            *("cpu", "run", "net_variants", "denoise", "decode", "preview", "snapshot"),
            *("outcome", "intake", "out_of_memory", *_ENGINE_BELOW),
        },
    },
    "worker": {
        "openmp": set(),
        "encode": set(),
        "daemon": set(),
        "image_checker": {"daemon"},
        "heartbeat": set(),
        "checkpoint_cache": {"daemon"},
        "crash_loops": {"checkpoint_cache"},
        "jobs": {"checkpoint_cache", "crash_loops", "encode"},
        "snapshots": {"jobs"},
        "deliver": {"image_checker", "encode"},
        "loop": {
            *("checkpoint_cache", "crash_loops", "jobs", "snapshots", "deliver", "heartbeat"),
        },
        "main": {"loop", "deliver", "heartbeat"},
        "supervisor": {"openmp"},
    },
}
ONLY_ENGINE = {"torch", "tokenizers", "numpy", "safetensors"}
#: What reads a checkpoint's small files without tensors has a library for it.
READERS = {
    ("weight_files.py", "safetensors"),
    ("prompt/embeddings.py", "safetensors"),
    ("prompt/tokenizer.py", "tokenizers"),
}
REFERENCES = {"diffusers", "transformers", "scipy"}  # of the tests, not of the product
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_MODULES = 420, 45, 12
MAX_CLASS_LINES, MAX_METHODS = 200, 15
#: Classes that are larger, and why.
LARGE_CLASSES = {
    "imaged.gateway.transport.protocol.DeadlineProtocol": "has the methods that uvicorn calls",
}
SOURCES = sorted(PACKAGE.rglob("*.py"))
#: All that holds code but the tests; what is under one top imports no circle of files.
TOPS = ("imaged", "training", "bench", "demo")
EVERYWHERE = [path for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))]


def module_of(path: Path) -> str:
    """imaged/store/jobs/queue.py -> imaged.store.jobs.queue"""
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


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


def breaches(module: str, source: str) -> list[str]:
    """What a module imports that its part, or its room, may not."""
    _, part, *inside = module.split(".")
    found = []
    for name in imports(source):
        top, *there = name.split(".")
        reads = (f"{'/'.join([part, *inside])}.py", top) in READERS
        if top in ONLY_ENGINE and part != "engine" and not reads:
            found.append(f"{part} imports {top}")
        if top in REFERENCES:
            found.append(f"{part} imports {top}, which takes seconds")
        if top != "imaged" or not there or part not in PARTS:
            continue
        if there[0] not in (part, *PARTS[part]):
            found.append(f"{part} imports {there[0]}")
        elif part in ROOMS and there[0] == part and inside and len(there) > 1:
            room, other = inside[0], there[1]
            if other not in (room, *ROOMS[part][room]):
                found.append(f"{part}.{room} imports {part}.{other}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    module = module_of(path)
    if module not in ("imaged", "imaged.__main__"):
        assert breaches(module, path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("imaged.gateway.app", "from imaged.engine import samplers"),
        ("imaged.gateway.app", "def f():\n    import torch"),
        ("imaged.engine.engine", "from imaged.settings import Settings"),
        ("imaged.engine.engine", "import imaged.store.jobs.queue"),
        ("imaged.engine.engine", "from diffusers import AutoencoderKL"),
        ("imaged.params.knobs", "import numpy as np"),
        ("imaged.params.knobs", "from imaged.jobs import Job"),
        ("imaged.prompt.report", "from imaged.checkpoint_info import metadata"),
        ("imaged.client.client", "from imaged.store.jobs import queue"),
        ("imaged.store.blobs", "from imaged.gateway.app import build_app"),
        ("imaged.gateway.present.errors", "from imaged.gateway import context"),
        ("imaged.gateway.submit.quotes", "from imaged.gateway.present.units import utc"),
        ("imaged.gateway.api.images", "from imaged.gateway.compat import openai"),
        ("imaged.gateway.compat.openai", "from imaged.gateway.api.images import submit"),
        ("imaged.store.accounts.keys", "from imaged.store.jobs import queue"),
        ("imaged.store.sql.database", "from imaged.store.blobs import Blobs"),
        ("imaged.engine.nets.unet", "from imaged.engine.engine import Engine"),
        ("imaged.engine.scheduling.batching", "from imaged.engine.loading import load"),
        ("imaged.engine.scheduling.device_time", "from imaged.engine.run import Run"),
        ("imaged.engine.net_variants", "from imaged.engine.intake import Intake"),
        ("imaged.worker.heartbeat", "from imaged.worker.loop import Worker"),
    ],
)
def test_planted_breaches_are_seen(module: str, source: str) -> None:
    assert len(breaches(module, source)) == 1


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """module -> the modules among these that it imports, also for the eyes of a type checker."""
    return {
        module: {
            known
            for name in imports(source)
            for known in (name, name.rpartition(".")[0])
            if known in sources and known != module
        }
        for module, source in sources.items()
    }


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A circle of modules that import each other; empty if there is none."""
    order = TopologicalSorter(arrows)
    try:
        order.prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def sources_of(top: str) -> dict[str, str]:
    return {module_of(path): path.read_text() for path in sorted((ROOT / top).rglob("*.py"))}


@pytest.mark.parametrize("top", TOPS)
def test_no_files_import_each_other_in_a_circle(top: str) -> None:
    assert circle(graph(sources_of(top))) == []


def test_a_planted_circle_is_seen() -> None:
    sources = sources_of("imaged")
    sources["imaged.errors"] += (
        "\nif TYPE_CHECKING:\n    from imaged.gateway.app import build_app\n"
    )
    assert circle(graph(sources))


def too_many(folders: Iterable[Path]) -> dict[str, int]:
    """Folders that hold more modules than a reader keeps in mind."""
    counts = Counter(path.parent for path in folders if path.name != "__init__.py")
    return {f"{folder}": n for folder, n in counts.items() if n > MAX_MODULES}


def test_no_folder_holds_too_many_modules() -> None:
    """Migrations are a history and not read as a whole."""
    assert too_many(path for path in EVERYWHERE if "versions" not in path.parts) == {}


def test_a_folder_of_too_many_is_seen() -> None:
    for folder in ("imaged/gateway/api", "bench", "bench/runs", "training/micro/parts"):
        more = [ROOT / folder / f"planted{n}.py" for n in range(MAX_MODULES)]
        assert [*too_many([*EVERYWHERE, *more])] == [str(ROOT / folder)]


def tables_seen(source: str) -> set[str]:
    """Names of imaged.store.sql.schema that a source imports; the module itself is "*"."""
    prefix = "imaged.store.sql.schema"
    found = {name for name in imports(source) if f"{name}.".startswith(f"{prefix}.")}
    return {name.removeprefix(prefix).removeprefix(".") or "*" for name in found}


@pytest.mark.parametrize("path", sorted((PACKAGE / "gateway").rglob("*.py")), ids=lambda p: p.name)
def test_the_gateway_has_no_table(path: Path) -> None:
    """It reads rows of jobs through functions that name their owner (decision 15)."""
    assert tables_seen(path.read_text()) == set()


@pytest.mark.parametrize(
    "planted",
    [
        "from imaged.store.sql.schema import jobs, workers",
        "def f():\n    from imaged.store.sql.schema import jobs as j",
        "from imaged.store.sql import schema",
        "import imaged.store.sql.schema",
        "import imaged.store.sql.schema as tables",
    ],
)
def test_a_handler_that_reads_jobs_itself_is_seen(planted: str) -> None:
    source = (PACKAGE / "gateway" / "api" / "account.py").read_text()
    assert tables_seen(f"{source}\n{planted}\n")


def too_long(source: str) -> list[str]:
    """The file, and those of its functions, that are longer than a reader holds in mind."""
    found = ["the file"] if len(source.splitlines()) > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES:
                found.append(node.name)
    return found


@pytest.mark.parametrize("path", EVERYWHERE, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    found = too_long(path.read_text())
    assert found[:1] != ["the file"] if "migrations" in path.parts else found == []


def test_what_is_too_long_is_seen() -> None:
    lines = "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    assert too_long(f"async def right():\n{lines}") == []
    assert too_long(f"def long():\n{lines}    y = 2\n") == ["long"]
    assert too_long("x = 1\n" * MAX_FILE_LINES) == []
    assert too_long("x = 1\n" * (MAX_FILE_LINES + 1)) == ["the file"]


def large_classes(module: str, source: str) -> list[str]:
    """Classes of more lines or methods than a reader holds in mind; properties are methods."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            methods = [
                n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            if lines > MAX_CLASS_LINES or len(methods) > MAX_METHODS:
                found.append(f"{module}.{node.name}")
    return found


def test_no_class_is_too_large() -> None:
    """And none is excused that is small enough."""
    found = [name for path in SOURCES for name in large_classes(module_of(path), path.read_text())]
    assert sorted(found) == sorted(LARGE_CLASSES)


def test_a_class_that_is_too_large_is_seen() -> None:
    source = (PACKAGE / "engine" / "run.py").read_text()
    methods = "".join(f"    async def m{n}(self): ...\n" for n in range(MAX_METHODS))
    nested = "    def outer(self):\n        def inner(): ...\n"
    fields = "    x = 1\n" * (MAX_CLASS_LINES - 1)
    for right, planted in (
        (methods, "    @property\n    def more(self): ...\n"),
        (methods[methods.index("\n") + 1 :] + nested, "    def more(self): ...\n"),
        (fields, "    y = 2\n"),
    ):
        assert large_classes("m", f"{source}\nclass Right:\n{right}") == []
        assert large_classes("m", f"{source}\nclass Large:\n{right}{planted}") == ["m.Large"]


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
        ("gateway/api/images.py", ["submit", "create", "result", "poll", "cancel"]),
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


#: What tests/unit does without: an engine, a server, a process. Some of these start one themselves.
NOT_IN_UNIT = (
    *("imaged.engine", "imaged.worker", "imaged.gateway.app", "imaged.gateway.serve", "torch"),
    *("uvicorn", "subprocess", "multiprocessing", "concurrent.futures.ProcessPoolExecutor"),
    *("time.sleep", "asyncio.sleep", "tests.contract"),
    *(f"tests.conftest.{name}" for name in ("Server", "imaged", "serving")),
)
FIXTURES_NOT_IN_UNIT = {"server", "nets"}
NAMING = ("usefixtures", "getfixturevalue")  # what names a fixture by its text


def waits(call: ast.Call) -> bool:
    """Whether it sleeps; sleep(0) is a turn of the loop, and no time."""
    named = isinstance(call.func, ast.Attribute) and call.func.attr == "sleep"
    return named and [ast.unparse(given) for given in call.args] != ["0"]


def asks_for(node: ast.AST) -> set[str]:
    """Fixtures that a function takes, or that a mark or a request names."""
    if isinstance(node, ast.arguments):
        return {given.arg for given in (*node.posonlyargs, *node.args, *node.kwonlyargs)}
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(NAMING):
        return {str(given.value) for given in node.args if isinstance(given, ast.Constant)}
    return set()


def more_than_a_unit(source: str) -> list[str]:
    """What a file under tests/unit has in it that belongs to another folder."""
    found = [
        name
        for name in imports(source)
        if f"{name}.".startswith(tuple(f"{n}." for n in NOT_IN_UNIT))
    ]
    for node in ast.walk(ast.parse(source)):
        found += sorted(asks_for(node) & FIXTURES_NOT_IN_UNIT)
        if isinstance(node, ast.Call) and waits(node):
            found.append(ast.unparse(node))
    return found


UNITS = sorted((ROOT / "tests" / "unit").rglob("*.py"))


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
def test_units_have_no_engine_no_server_no_process_and_do_not_sleep(path: Path) -> None:
    assert more_than_a_unit(path.read_text()) == []


@pytest.mark.parametrize(
    "planted",
    [
        "from imaged.engine.decode import Picture",
        "from imaged import engine",
        "import imaged.worker.supervisor",
        "def f():\n    from imaged.gateway.app import build_app",
        "from imaged.gateway import serve",
        "import torch",
        "from torch.nn import functional",
        "import uvicorn",
        "from subprocess import run",
        "import multiprocessing as m",
        "from concurrent.futures import ProcessPoolExecutor",
        "from tests.conftest import Server",
        "from tests.contract.gate import Gate",
        "from time import sleep",
        "import time as t\nt.sleep(0.1)",
        "async def f():\n    await asyncio.sleep(0.001)",
        "def test_x(server): ...",
        "async def test_x(db, *, nets): ...",
        "@pytest.mark.usefixtures('server')\ndef test_x(): ...",
        "def test_x(request):\n    request.getfixturevalue('nets')",
    ],
)
def test_what_is_no_unit_is_seen(planted: str) -> None:
    right = (ROOT / "tests" / "unit" / "test_response_cache.py").read_text()
    assert "await asyncio.sleep(0)" in right  # a turn of the loop may be waited for
    assert len(more_than_a_unit(f"{right}\n{planted}\n")) == 1


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
