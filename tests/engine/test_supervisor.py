"""What the supervisor of workers sees of them in the store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

from imaged.settings import Settings
from imaged.store.jobs import queue
from imaged.store.sql.database import Database
from imaged.worker.supervisor import Supervisor, _Slot
from tests.in_store import worker


def test_a_hang_is_seen_with_and_without_a_job(db: Database, tmp_path: Path) -> None:
    supervisor = Supervisor(Settings(data=tmp_path, hang_s=300.0), db)
    slot = _Slot(cast(Any, None), "w", started=time.monotonic())
    now = time.time()
    worker(db, now=now)

    def beat(ticked_ago: float, checkpoint: str | None) -> bool:
        with db.write() as c:
            queue.beat(c, "w", now, now - ticked_ago, checkpoint, {})
        return supervisor.hangs(slot)

    assert not beat(ticked_ago=1000.0, checkpoint=None)  # loads its first checkpoint
    assert not beat(ticked_ago=1.0, checkpoint="micro")
    assert beat(ticked_ago=1000.0, checkpoint="micro")  # its only job was cancelled, it hangs on
