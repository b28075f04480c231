"""What each module of the gateway takes from the store: jobs are read through the board alone.

The board gives a job to the key that owns it. A module that came to a job another way would not
ask whose it is, so all that one takes from the store or from SQLAlchemy is listed here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from imaged.gateway import access

GATEWAY = Path(access.__file__).parent
MODULES = sorted(path.name for path in GATEWAY.rglob("*.py"))
#: Beside classes and constants, which read nothing.
TAKES = {
    "account.py": {"ledger.free", "ledger.used"},  # by the key that asks
    "admit.py": {"keys.find", "models.catalogue", "queue.put", "queue.refuse", "repeats.known"},
    "dispatch.py": {
        *("outbox.any_due", "outbox.delivered", "outbox.expire", "outbox.failed", "outbox.gone"),
        *("outbox.lease", "webhooks.secret_of"),  # to those who gave their address
    },
    "drafts.py": {"drafts.go_on"},  # of a job in hand
    "history.py": {"history.find", "history.one"},  # of the key that asks
    "images.py": {"queue.cancel", "blobs.verify", "Blobs.read"},  # of a job in hand; a signed link
    "ops.py": {  # the chores, which answer nobody
        *("queue.expire", "queue.read", "queue.reap", "history.forget", "history.keep"),
        *("Blobs.delete_of", "Blobs.job_ids", "demand.states", "schema.workers"),
        *("schema.workers.c", "sa.func", "sa.select"),
    },
    "metrics.py": {  # how many, how long, where; nobody's
        *("demand.counts", "demand.states", "demand.workers_since"),
        "models.catalogue",
    },
    "preflight.py": {"pace.pace", "demand.states"},  # counts; the key that asks
    "replies.py": {"blobs.sign"},
    "sdapi.py": {"queue.open_of"},  # ids of the key that asks
    "state.py": {"keys.load_secret", "keys.load_signer", "Blobs.read"},  # of a job in hand
    "wait.py": {"queue.read", "progress.previews", "progress.stands"},  # the board
    "webhooks.py": {  # of the key that asks
        *("webhooks.add", "webhooks.deactivate", "webhooks.log_of", "webhooks.of_key"),
        *("webhooks.secret_of", "webhooks.update"),
    },
}
#: Ways past the list: a driver's connection, SQL as text, imports that are not written as such.
PAST = {"cursor", "driver_connection", "engine", "exec_driver_sql", "import_module", "importlib"}
PAST |= {"__import__", "raw_connection", "pysqlite3", "sqlite3", "aiosqlite"}


def takes(source: str) -> set[str]:
    """Functions, tables and SQL that a module takes; a star for a module taken whole."""
    tree = ast.parse(source)
    names = dict(_imported(tree))
    nodes = list(ast.walk(tree))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    before_a_dot = {id(node.value) for node in attributes}
    found = set(names.values())
    for node in nodes:
        if isinstance(node, ast.Name) and node.id in names and id(node) not in before_a_dot:
            found.add(names[node.id] + ("" if _is_one_name(names[node.id]) else ".*"))
    for attribute in attributes:
        inner = attribute.value
        if isinstance(inner, ast.Name) and inner.id in names:
            found.add(f"{names[inner.id]}.{attribute.attr}")
        elif isinstance(inner, ast.Attribute) and inner.attr in ("blobs", "board"):
            found.add(f"{inner.attr.title()}.{attribute.attr}")
    return {name for name in found if not _reads_nothing(name)} | _past(nodes)


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local names of the store's and SQLAlchemy's modules and of what is in them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            pairs = [(a.asname or a.name.split(".")[0], a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            pairs = [(a.asname or a.name, f"{node.module}.{a.name}") for a in node.names]
        else:
            continue
        for here, there in pairs:
            if there.startswith("imaged.store"):
                yield here, there.removeprefix("imaged.store").removeprefix(".") or "*"
            elif there.split(".")[0] == "sqlalchemy":
                yield here, there.replace("sqlalchemy", "sa", 1)


def _is_one_name(name: str) -> bool:
    return "." in name and name != "sa.exc"


def _reads_nothing(name: str) -> bool:
    """A module as such, the board's own methods, or a class or constant of the store."""
    first, _, rest = name.partition(".")
    if first == "sa":
        return rest in ("", "exc", "Connection")
    if first == "Board":
        return not rest.startswith("_")
    return name != "*" and (not rest or (first != "Blobs" and rest[0].isupper()))


def _past(nodes: list[ast.AST]) -> set[str]:
    words = {getattr(n, "attr", None) or getattr(n, "id", None) for n in nodes}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            words |= {part for a in node.names for part in a.name.split(".")}
            words |= set((getattr(node, "module", None) or "").split("."))
    return {str(word) for word in words if word in PAST}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_takes_from_the_store_what_is_listed(module: str) -> None:
    assert takes((GATEWAY / module).read_text()) == TAKES.get(module, set())


@pytest.mark.parametrize(
    ("module", "planted"),
    [
        ("images.py", "from imaged.store.queue import read"),
        ("account.py", "def f(c):\n    from imaged.store.queue import newest as n\n    n(c)"),
        ("images.py", "def f(c):\n    return queue.read(c, ['x'])"),
        ("images.py", "def f(c, key):\n    return queue.open_of(c, 1)"),
        ("sdapi.py", "def f(c):\n    return queue.newest(c)"),
        ("events.py", "from imaged.store import progress\nfound = progress.previews"),
        ("events.py", "from imaged.store import progress as p\np.previews(None, [])"),
        ("images.py", "everything = queue"),
        ("images.py", "given = getattr(queue, 'read')"),
        ("account.py", "import imaged.store.queue\nimaged.store.queue.read(None, [])"),
        ("account.py", "from imaged.store import *"),
        ("account.py", "from imaged import store\nstore.queue.read(None, [])"),
        ("account.py", "from imaged.store.schema import jobs"),
        ("account.py", "def f(gateway, name):\n    return gateway.blobs.read(name)"),
        ("account.py", "def f(gateway, job_id):\n    return gateway.board._jobs.get(job_id)"),
        ("history.py", "def f(c):\n    return history._of_key(1)"),
        ("webhooks.py", "def f(c):\n    return c.execute(sa.text('SELECT * FROM jobs'))"),
        ("webhooks.py", "def f(c):\n    return c.execute(sa.select(sa.table('jobs')))"),
        ("account.py", "from sqlalchemy import text"),
        ("account.py", "import sqlalchemy as q\nq.text('')"),
        ("account.py", "from sqlalchemy.sql.expression import literal_column"),
        ("account.py", "def f(c):\n    return c.exec_driver_sql('SELECT * FROM jobs')"),
        ("account.py", "def f(gateway):\n    return gateway.db.engine.raw_connection()"),
        ("account.py", "import sqlite3"),
        ("account.py", "import pysqlite3.dbapi2 as sqlite"),
        ("account.py", "q = __import__('imaged.store.queue')"),
        ("account.py", "from importlib import import_module as i"),
    ],
)
def test_another_way_to_jobs_is_seen(module: str, planted: str) -> None:
    source = f"{(GATEWAY / module).read_text()}\n{planted}\n"
    assert takes(source) > TAKES.get(module, set())
