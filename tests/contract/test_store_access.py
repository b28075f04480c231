"""What each module of the gateway takes from the store: jobs are read by JobReader alone.

It gives a job to the key that owns it. A module that came to a job another way would not
ask whose it is, so all that one takes from the store or from SQLAlchemy is listed here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from imaged.gateway import auth

GATEWAY = Path(auth.__file__).parent
MODULES = sorted(path.relative_to(GATEWAY).as_posix() for path in GATEWAY.rglob("*.py"))
PACKAGES = re.compile(r"(sql|jobs|accounts|webhooks)\.")  # of the store
#: Beside classes and constants, which read nothing.
TAKES = {
    "api/account.py": {"ledger.free", "ledger.used"},  # by the key that asks
    "api/drafts.py": {"drafts.resume"},  # of a job in hand
    "api/files.py": {"blobs.verify", "Blobs.read"},  # a signed link
    "api/images.py": {"queue.cancel"},  # of a job in hand
    "api/models.py": {"model_demand.states"},  # nobody's
    "api/preflight.py": {"workload.pace", "model_demand.states"},  # counts; the key that asks
    "api/webhooks.py": {  # of the key that asks
        *("subscriptions.add", "subscriptions.deactivate", "subscriptions.log_of"),
        *("subscriptions.of_key", "subscriptions.secret_of", "subscriptions.update"),
    },
    "compat/a1111.py": {"queue.open_of"},  # ids of the key that asks
    "compat/segmind.py": {"history.find", "history.one"},  # of the key that asks
    "context.py": {"keys.load_secret", "keys.load_signer", "Blobs.read"},  # of a job in hand
    "operations/health.py": {"model_demand.workers_since"},  # how many; nobody's
    "operations/maintenance.py": {  # which answers nobody
        *(
            "queue.delete_expired",
            "queue.read",
            "queue.reap",
            "history.delete_older",
            "history.keep",
        ),
        *("Blobs.delete_of", "Blobs.job_ids"),
    },
    "operations/metrics.py": {  # how many, how long, where; nobody's
        *("model_demand.counts", "model_demand.states", "model_demand.workers_since"),
        "catalogue.catalogue",
    },
    "present/links.py": {"blobs.sign"},
    "read/job_reader.py": {"queue.read", "progress.previews", "progress.statuses"},
    "submit/submission.py": {"signing.mac"},
    "submit/quotes.py": {"signing.mac", "signing.same"},
    "submit/admission.py": {
        *("keys.find", "catalogue.catalogue", "queue.put", "queue.refuse"),
    },
    "webhooks/delivery.py": {
        *(
            "outbox.any_due",
            "outbox.delivered",
            "outbox.delete_older",
            "outbox.failed",
            "outbox.gone",
        ),
        *("outbox.lease", "subscriptions.secret_of"),  # to those who gave their address
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
        elif isinstance(inner, ast.Attribute) and inner.attr in ("blobs", "reader"):
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
                inside = there.removeprefix("imaged.store").removeprefix(".")
                yield here, PACKAGES.sub("", inside) or "*"
            elif there.split(".")[0] == "sqlalchemy":
                yield here, there.replace("sqlalchemy", "sa", 1)


def _is_one_name(name: str) -> bool:
    return "." in name and name != "sa.exc"


def _reads_nothing(name: str) -> bool:
    """A module as such, JobReader's own methods, or a class or constant of the store."""
    first, _, rest = name.partition(".")
    if first == "sa":
        return rest in ("", "exc", "Connection")
    if first == "Reader":
        return not rest.startswith("_")
    return name != "*" and (not rest or (first != "Blobs" and rest[0].isupper()))


def _past(nodes: list[ast.AST]) -> set[str]:
    declared = {id(n.target) for n in nodes if isinstance(n, ast.AnnAssign)}  # as fields are
    words = {
        getattr(n, "attr", None) or getattr(n, "id", None) for n in nodes if id(n) not in declared
    }
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
        ("api/images.py", "from imaged.store.jobs.queue import read"),
        (
            "api/account.py",
            "def f(c):\n    from imaged.store.jobs.queue import newest as n\n    n(c)",
        ),
        ("api/images.py", "def f(c):\n    return queue.read(c, ['x'])"),
        ("api/images.py", "def f(c, key):\n    return queue.open_of(c, 1)"),
        ("compat/a1111.py", "def f(c):\n    return queue.newest(c)"),
        ("api/events.py", "from imaged.store.jobs import progress\nfound = progress.previews"),
        ("api/events.py", "from imaged.store.jobs import progress as p\np.previews(None, [])"),
        ("api/images.py", "everything = queue"),
        ("api/images.py", "given = getattr(queue, 'read')"),
        (
            "api/account.py",
            "import imaged.store.jobs.queue\nimaged.store.jobs.queue.read(None, [])",
        ),
        ("api/account.py", "from imaged.store import *"),
        ("api/account.py", "from imaged import store\nstore.jobs.queue.read(None, [])"),
        ("api/account.py", "from imaged.store.sql.schema import jobs"),
        ("api/account.py", "def f(gateway, name):\n    return gateway.blobs.read(name)"),
        ("api/account.py", "def f(gateway, job_id):\n    return gateway.reader._jobs.get(job_id)"),
        ("compat/segmind.py", "def f(c):\n    return history._of_key(1)"),
        ("api/account.py", "def f(c):\n    return c.execute(sa.text('SELECT * FROM jobs'))"),
        ("api/account.py", "def f(c):\n    return c.execute(sa.select(sa.table('jobs')))"),
        ("api/account.py", "from sqlalchemy import text"),
        ("api/account.py", "import sqlalchemy as q\nq.text('')"),
        ("api/account.py", "from sqlalchemy.sql.expression import literal_column"),
        ("api/account.py", "def f(c):\n    return c.exec_driver_sql('SELECT * FROM jobs')"),
        ("api/account.py", "def f(gateway):\n    return gateway.db.engine.raw_connection()"),
        ("api/account.py", "import sqlite3"),
        ("api/account.py", "import pysqlite3.dbapi2 as sqlite"),
        ("api/account.py", "q = __import__('imaged.store.jobs.queue')"),
        ("api/account.py", "from importlib import import_module as i"),
    ],
)
def test_another_way_to_jobs_is_seen(module: str, planted: str) -> None:
    source = f"{(GATEWAY / module).read_text()}\n{planted}\n"
    assert takes(source) > TAKES.get(module, set())
