"""Connections to the one SQL store: SQLite embedded, PostgreSQL on a cluster."""

from __future__ import annotations

import os
import select
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from imaged.errors import CommandError
from imaged.store import hint

SOON_S = 0.001  # from one look to the next, after a hint that somebody writes
OFTEN_S = 0.005  # where there are no hints
SELDOM_S = 0.05  # without a hint, where there are some; and where every look is a query
WAL_RESET_FIXED = (3, 51, 3)  # older ones can corrupt a WAL database that two processes write


class Database:
    """Opens transactions. `write` takes SQLite's write lock at once, so no upgrade can fail."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sqlite = url.startswith("sqlite")
        self.engine = (
            _sqlite_engine(url) if self.sqlite else sa.create_engine(url, hide_parameters=True)
        )

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
    """Tells whether anybody has written since it was last asked. `exact` with SQLite, which
    answers by its data version; of other stores it is always said that somebody has.

    `hint`, where there is one, can be read when somebody begins to write. The commit follows, at
    once or when the disk has it: `hear` takes the hint, and `pause_s` is short for a while.
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
            self._version()  # with that, the log is there
            self.hint = hint.listen(Path(f"{os.path.realpath(str(db.engine.url.database))}-wal"))
        if self.hint is not None:
            weakref.finalize(self, os.close, self.hint)

    def changed(self) -> bool:
        if self._raw is None:
            return True
        before, self._seen = self._seen, self._version()
        return self._seen != before

    def hear(self) -> None:
        """Somebody has begun to write."""
        if self.hint is not None:
            hint.take(self.hint)
            self._heard_at = time.monotonic()

    @property
    def pause_s(self) -> float:
        """How long a look can wait, unless there is a new hint. After one, half as long as it is
        old: a commit is seen within one and a half of its time.
        """
        if self.hint is None:
            return OFTEN_S if self.exact else SELDOM_S
        return min(max(SOON_S, (time.monotonic() - self._heard_at) / 2), SELDOM_S)

    def wait(self, timeout_s: float) -> None:
        """Return when something was written since the last `changed`, or after the timeout."""
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
