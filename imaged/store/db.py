"""Connections to the one SQL store: SQLite embedded, PostgreSQL on a cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from imaged.errors import CommandError

WAL_RESET_FIXED = (3, 51, 3)  # older ones can corrupt a WAL database that two processes write


class Database:
    """Opens transactions. `write` takes SQLite's write lock at once, so no upgrade can fail."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sqlite = url.startswith("sqlite")
        self.engine = _sqlite_engine(url) if self.sqlite else sa.create_engine(url)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One consistent view."""
        with self.engine.connect().execution_options(read_only=True) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction: committed at the end, rolled back on any exception."""
        with self.engine.begin() as connection:
            yield connection

    def migrate(self) -> None:
        """Bring the schema to this version's."""
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def wait_for_change(self, timeout_s: float, poll_s: float = 0.02) -> None:
        """Return when another connection has written something, or after the timeout.

        A hint: SQLite tells by its data version; elsewhere this is a short sleep.
        """
        if not self.sqlite:
            time.sleep(min(timeout_s, 0.25))
            return
        deadline = time.monotonic() + timeout_s
        with self.engine.connect() as connection:
            raw = connection.connection.dbapi_connection
            assert raw is not None
            before = _data_version(raw)
            while time.monotonic() < deadline and _data_version(raw) == before:
                time.sleep(poll_s)

    def close(self) -> None:
        self.engine.dispose()


def _data_version(raw: Any) -> int:
    return int(raw.execute("PRAGMA data_version").fetchone()[0])


def _sqlite_engine(url: str) -> sa.Engine:
    import pysqlite3.dbapi2 as sqlite  # carries its own, current SQLite

    if sqlite.sqlite_version_info < WAL_RESET_FIXED:
        raise CommandError(f"SQLite {sqlite.sqlite_version} is too old: 3.51.3 or newer is needed")
    engine = sa.create_engine(url, module=sqlite, connect_args={"timeout": 30})

    @sa.event.listens_for(engine, "connect")
    def _on_connect(raw: Any, _: Any) -> None:
        raw.isolation_level = None  # transactions are ours, see _on_begin
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            raw.execute(f"PRAGMA {pragma}").close()

    @sa.event.listens_for(engine, "begin")
    def _on_begin(connection: sa.Connection) -> None:
        read_only = connection.get_execution_options().get("read_only")
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine
