"""Connections to the SQL store: SQLite embedded, PostgreSQL on a cluster."""

from __future__ import annotations

import asyncio
import os
import select
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from imaged.errors import CommandError
from imaged.store.sql import write_hint

T = TypeVar("T")

SOON_S = 0.001  # seconds between two checks, just after a write hint
OFTEN_S = 0.005  # where the system gives no hints
SELDOM_S = 0.05  # long after a hint; and where a check is a query
WAL_RESET_FIXED = (3, 51, 3)  # older SQLite can corrupt a WAL file that two processes write


class Database:
    """Opens transactions. Writers take SQLite's lock at the start, so none fails upgrading
    a read.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.sqlite = url.startswith("sqlite")
        self.engine = (
            _sqlite_engine(url) if self.sqlite else sa.create_engine(url, hide_parameters=True)
        )

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A read transaction: one consistent view."""
        with self.engine.connect().execution_options(read_only=True) as connection:
            yield connection

    async def query(self, work: Callable[[sa.Connection], T]) -> T:
        """What `work` reads in one transaction; it runs in a thread."""

        def run() -> T:
            with self.read() as connection:
                return work(connection)

        return await asyncio.to_thread(run)

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A write transaction: committed at the end, rolled back on any exception."""
        with self.engine.begin() as connection:
            yield connection

    def migrate(self) -> None:
        """Apply the migrations up to this version."""
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        self.engine.dispose()


class Watch:
    """Detects writes of other connections, by SQLite's data_version.

    exact: false for other databases: `changed` is then always true.
    hint:  a file descriptor, or None, that becomes readable when somebody begins to write; the
           commit follows within milliseconds. `hear` consumes it and shortens `pause_s` for a
           while.
    """

    def __init__(self, db: Database) -> None:
        self._raw: Any = None
        self._seen = -1
        self._heard_at = -SELDOM_S
        self.exact = db.sqlite
        self.hint: int | None = None
        if db.sqlite:
            self._connection = db.engine.raw_connection()
            self._raw = self._connection.dbapi_connection
            self._version()  # creates the WAL file
            self.hint = write_hint.listen(
                Path(f"{os.path.realpath(str(db.engine.url.database))}-wal")
            )
        if self.hint is not None:
            weakref.finalize(self, os.close, self.hint)

    def changed(self) -> bool:
        if self._raw is None:
            return True
        before, self._seen = self._seen, self._version()
        return self._seen != before

    def hear(self) -> None:
        """Consume a write hint."""
        if self.hint is not None:
            write_hint.take(self.hint)
            self._heard_at = time.monotonic()

    @property
    def pause_s(self) -> float:
        """Seconds until the next check, unless a hint comes first: half the age of the last hint,
        so that a commit is seen within one and a half times its duration.
        """
        if self.hint is None:
            return OFTEN_S if self.exact else SELDOM_S
        return min(max(SOON_S, (time.monotonic() - self._heard_at) / 2), SELDOM_S)

    def wait(self, timeout_s: float) -> None:
        """Return once something was written since the last `changed`, or after the timeout."""
        if self._raw is None:
            time.sleep(min(timeout_s, 0.25))
            return
        deadline = time.monotonic() + timeout_s
        hints = [] if self.hint is None else [self.hint]
        while (left_s := deadline - time.monotonic()) > 0 and self._version() == self._seen:
            if select.select(hints, [], [], min(left_s, self.pause_s))[0]:
                self.hear()

    def _version(self) -> int:
        return int(self._raw.execute("PRAGMA data_version").fetchone()[0])


def _sqlite_engine(url: str) -> sa.Engine:
    import pysqlite3.dbapi2 as sqlite  # carries its own, current SQLite

    if sqlite.sqlite_version_info < WAL_RESET_FIXED:
        raise CommandError(f"SQLite {sqlite.sqlite_version} is too old: 3.51.3 or newer is needed")
    engine = sa.create_engine(
        url, module=sqlite, connect_args={"timeout": 30}, hide_parameters=True
    )  # prompts have no place in a log

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
