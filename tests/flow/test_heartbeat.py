"""Progress and previews from the worker's hand to the row: kept, read by few, gone at the end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from PIL import Image

import imaged.store.sql
from imaged.jobs import Job, JobReport, Preview
from imaged.store.jobs import progress, queue
from imaged.store.sql.database import Database
from imaged.store.sql.schema import progress as table
from imaged.worker.encode import encode_preview
from imaged.worker.heartbeat import Heartbeat
from tests.in_store import KEEP_S, RESULT, claim, get, make_key, put, worker


def beat(db: Database, held: dict[str, JobReport], now: float = 3.0) -> None:
    with db.write() as c:
        queue.beat(c, "w", now, now, "micro", held)


def preview(db: Database, job_id: str) -> Preview | None:
    with db.read() as c:
        return progress.previews(c, [job_id]).get(job_id)


def rows(db: Database) -> int:
    with db.read() as c:
        return int(c.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


@pytest.fixture
def running(db: Database) -> Job:
    """A job in the hands of the worker `w`, with a preview after call 5."""
    job_id = put(db, make_key(db))
    worker(db)
    [job] = claim(db)
    beat(db, {job_id: JobReport(1, 7, b"five", 5)})
    return job


def test_a_beat_brings_a_preview_and_keeps_it(db: Database, running: Job) -> None:
    assert preview(db, running.id) == Preview(5, b"five")
    assert (get(db, running.id).calls_done, get(db, running.id).preview_call) == (7, 5)
    beat(db, {running.id: JobReport(1, 9)})
    assert preview(db, running.id) == Preview(5, b"five")
    assert (get(db, running.id).calls_done, get(db, running.id).preview_call) == (9, 5)
    beat(db, {running.id: JobReport(1, 11, b"ten", 10)})
    assert preview(db, running.id) == Preview(10, b"ten")
    beat(db, {running.id: JobReport(2, 12, b"late", 12)})  # another epoch
    assert preview(db, running.id) == Preview(10, b"ten")


def test_jobs_with_and_without_previews_share_a_beat(db: Database, running: Job) -> None:
    other = put(db, running.key_id)
    claim(db)
    beat(db, {running.id: JobReport(1, 8), other: JobReport(1, 2, b"two", 2)})
    assert preview(db, running.id) == Preview(5, b"five")
    assert preview(db, other) == Preview(2, b"two")


def selected(db: Database, work: Any) -> list[str]:
    """The statements that some work sends."""
    sent: list[str] = []
    listener = ("before_cursor_execute", lambda *a: sent.append(a[2]))
    sa.event.listen(db.engine, *listener)
    with db.read() as c:
        work(c)
    sa.event.remove(db.engine, *listener)
    return sent


def test_polls_do_not_read_previews(db: Database, running: Job) -> None:
    def loads(work: Any) -> bool:
        return any("progress.preview," in s or "progress.preview " in s for s in selected(db, work))

    assert not loads(lambda c: queue.read(c, [running.id]))
    assert not loads(lambda c: queue.newest(c))
    assert loads(lambda c: progress.previews(c, [running.id]))  # the probe does see one


@pytest.mark.parametrize("end", ["finish", "fail", "cancel", "reap", "release"])
def test_previews_go_with_the_end(db: Database, running: Job, end: str) -> None:
    with db.write() as c:
        if end == "finish":
            assert queue.finish(c, running, "w", RESULT, 4.0, KEEP_S)
        elif end == "fail":
            assert queue.fail(c, running, "w", "nan_output", "text", 4.0, KEEP_S)
        elif end == "cancel":
            assert queue.cancel(c, running.id, 4.0, KEEP_S)
        elif end == "reap":
            queue.reap(c, 50.0, lease_s=100, queue_s=100, run_s=1, retention_s=KEEP_S)
        else:
            assert queue.end_lease(c, "w", 4.0, KEEP_S, blame=False) == 1
    assert preview(db, running.id) is None
    after = get(db, running.id)
    assert after.preview_call == 0
    made = {"finish": after.unet_calls, "release": 0}.get(end, 7)  # given back: it begins anew
    assert after.calls_done == made


def test_nothing_stays_after_expiry(db: Database, running: Job) -> None:
    with db.write() as c:
        queue.cancel(c, running.id, 4.0, 10.0)
    assert rows(db) == 1
    with db.write() as c:
        assert [job.id for job in queue.delete_expired(c, 15.0)] == [running.id]
    assert rows(db) == 0


def test_the_heartbeat_writes_a_preview_once(
    db: Database, running: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat = Heartbeat(db, "w")
    beats: list[dict[str, JobReport]] = []

    def beat(*args: Any) -> set[str]:
        beats.append(args[5])
        return set()

    monkeypatch.setattr(queue, "beat", beat)
    full = [
        {running.id: JobReport(1, 6, b"six", 6)},
        {running.id: JobReport(1, 7, b"six", 6)},
        {running.id: JobReport(1, 8, b"eight", 8)},
        {running.id: JobReport(2, 8, b"again", 8)},  # a later attempt that got as far
    ]
    for held in full:
        heartbeat.report(held)
        heartbeat.beat_once()
    assert [b[running.id].preview for b in beats] == [b"six", None, b"eight", b"again"]
    assert [b[running.id].calls for b in beats] == [6, 7, 8, 8]


def test_a_preview_whose_write_failed_is_written_again(db: Database, running: Job) -> None:
    heartbeat = Heartbeat(db, "w")
    heartbeat.report({running.id: JobReport(1, 6, b"six", 6)})
    with db.write() as c:
        c.exec_driver_sql("ALTER TABLE progress RENAME TO elsewhere")
    heartbeat.beat_once()  # an OperationalError, logged
    with db.write() as c:
        c.exec_driver_sql("ALTER TABLE elsewhere RENAME TO progress")
    heartbeat.beat_once()
    assert preview(db, running.id) == Preview(6, b"six")


def test_previews_are_jpegs_made_once() -> None:
    rgb = bytes([200, 40, 40]) * (64 * 48)
    jpeg = encode_preview(rgb, 64, 48)
    with Image.open(io.BytesIO(jpeg)) as image:
        assert (image.format, image.size) == ("JPEG", (64, 48))
        red, green, blue = image.convert("RGB").resize((1, 1)).tobytes()
    assert abs(red - 200) < 6 and abs(green - 40) < 6 and abs(blue - 40) < 6
    assert encode_preview(rgb, 64, 48) is jpeg


def test_a_store_of_the_first_schema_is_brought_up(tmp_path: Path) -> None:
    """What was written before previews is still there after the migration."""
    database = Database(f"sqlite:///{tmp_path / 'old.db'}")
    config = Config()
    config.set_main_option(
        "script_location", f"{Path(imaged.store.sql.__file__).parent}/migrations"
    )
    with database.engine.begin() as c:
        config.attributes["connection"] = c
        command.upgrade(config, "0001")
        c.exec_driver_sql("INSERT INTO progress (job_id, calls_done) VALUES ('x', 3)")
    database.migrate()
    with database.read() as c:
        assert c.exec_driver_sql("SELECT * FROM progress").all() == [("x", 3, None, None)]
    database.close()
