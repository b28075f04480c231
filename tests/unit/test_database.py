"""The database itself: its schema, commits in groups, a full disk, and who hears of writes."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from imaged.params.image_params import ImageParams
from imaged.store.accounts import ledger
from imaged.store.jobs import queue
from imaged.store.sql import database as module
from imaged.store.sql.database import SOON_S, Database, Watch
from imaged.store.sql.group_commit import Writer
from imaged.store.sql.schema import jobs, metadata
from tests.in_store import asking, audit, free, make_key


def test_schema_is_what_the_migrations_make(db: Database) -> None:
    with db.read() as c:
        assert compare_metadata(MigrationContext.configure(c), metadata) == []


def test_sqlite_is_durable_and_not_in_the_corruption_range(db: Database) -> None:
    with db.read() as c:
        assert c.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert c.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        version = c.exec_driver_sql("SELECT sqlite_version()").scalar_one()
    assert tuple(map(int, version.split("."))) >= (3, 51, 3)


def test_writer_commits_together_and_fails_apart(db: Database) -> None:
    key_id = make_key(db, credits_micros=10**6)
    writer = Writer(db)

    def good(c: sa.Connection) -> None:
        ledger.grant(c, key_id, 1, 1.0)

    def bad(c: sa.Connection) -> None:
        ledger.grant(c, key_id, 1000, 1.0)
        raise ValueError("mine alone")

    futures = [writer.submit(bad if n % 10 == 3 else good) for n in range(100)]
    failures = [f.exception(10) for f in futures]
    writer.close()
    assert sum(f is not None for f in failures) == 10
    assert free(db, key_id) == 10**6 + 90
    assert audit(db) == []


def test_a_full_disk_in_a_group_commit_loses_nothing_that_was_promised(db: Database) -> None:
    """SQLite undoes the whole transaction when a statement in its middle finds the disk full."""
    key_id = make_key(db, credits_micros=10**9)
    db.close()

    def narrow(raw: Any, _: Any) -> None:
        raw.execute("PRAGMA max_page_count=200").close()  # 800 KB: full
        raw.execute("PRAGMA cache_size=10").close()  # so that pages are written in mid-transaction

    asked = asking(key_id, 1, params=ImageParams("x" * 20_000))

    sa.event.listen(db.engine, "connect", narrow)
    writer, gate = Writer(db), threading.Event()
    writer.submit(lambda _: gate.wait(20))  # all others gather behind it
    answers = [writer.submit(lambda c: queue.put(c, asked, 1.0)) for _ in range(60)]
    gate.set()
    writer.close()
    promised = {f.result().job_id for f in answers if f.exception() is None}
    with db.read() as c:
        kept = set(c.execute(sa.select(jobs.c.id)).scalars())
    assert len(promised) < len(answers)  # it did become full
    assert kept == promised
    assert audit(db) == []


def test_a_caller_that_gives_up_does_not_stop_the_writer(db: Database) -> None:
    writer, gate = Writer(db), threading.Event()
    writer.submit(lambda _: gate.wait(20))
    ran: list[int] = []
    given_up = writer.submit(lambda _: ran.append(1))
    assert given_up.cancel()
    gate.set()
    assert writer.submit(lambda _: 5).result(20) == 5
    assert ran == []
    writer.close()


def test_wait_for_a_change_returns_when_another_writes(db: Database) -> None:
    watch = Watch(db)
    watch.changed()
    assert not watch.changed()
    timer = threading.Timer(0.2, lambda: make_key(db))
    timer.start()
    start = time.monotonic()
    watch.wait(timeout_s=20.0)
    assert time.monotonic() - start < 15
    assert watch.changed()
    timer.join()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there are no hints")
def test_a_hint_of_a_write_is_followed(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here nobody looks without one, and nobody looks often when there was none."""
    monkeypatch.setattr(module, "SELDOM_S", 60.0)
    watch = Watch(db)
    watch.changed()
    watch.wait(timeout_s=0.1)
    assert watch.pause_s > 100 * SOON_S and not watch.changed()
    timer = threading.Timer(0.2, lambda: make_key(db))
    timer.start()
    start = time.monotonic()
    watch.wait(timeout_s=30.0)
    assert time.monotonic() - start < 15  # without hints: 30
    assert watch.changed()
    timer.join()
    looks, version = [], watch._version
    watch._version = lambda: looks.append(1) or version()  # type: ignore[method-assign,func-returns-value]
    watch.wait(timeout_s=0.3)  # the hint of a write that was seen already
    assert 3 < len(looks) < 100  # it is followed for a while, and taken


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there are no hints")
def test_there_are_hints_behind_a_link(db: Database, tmp_path: Path) -> None:
    """SQLite keeps its log beside the file itself."""
    link = tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(str(db.engine.url.database))
    other = Database(f"sqlite:///{link}")
    assert Watch(other).hint is not None
    other.close()


def test_hints_end_with_their_watch(db: Database) -> None:
    watch = Watch(db)
    descriptor = watch.hint
    del watch
    gc.collect()
    if descriptor is not None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
