"""Keeps worker processes alive: restarts those that die and kills those that hang."""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import sqlalchemy as sa

from imaged.settings import Settings
from imaged.store.jobs import load_failures, queue
from imaged.store.sql.database import Database
from imaged.store.sql.schema import jobs, workers
from imaged.worker.openmp import waiting

log = logging.getLogger(__name__)

POLL_S = 0.25
START_S = 120.0  # how long a worker may take to register
MAX_RESTART_S = 30.0


@dataclass
class _Slot:
    """One worker that should run; quick_deaths: in a row, for the back-off of restarts."""

    process: subprocess.Popen[bytes]
    worker_id: str
    started: float
    quick_deaths: int = 0
    restart_at: float = 0.0
    released: bool = False
    registered: bool = False


class Supervisor:
    """Runs `settings.workers` worker processes until stopped."""

    def __init__(self, settings: Settings, db: Database) -> None:
        self._settings, self._db = settings, db
        self._stopping = threading.Event()
        self._slots: list[_Slot] = []
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        with self._db.write() as connection:
            load_failures.clear(connection)
        self._slots = [self._spawn() for _ in range(self._settings.workers)]
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """SIGTERM to all, then SIGKILL to those that are still there after the grace time."""
        self._stopping.set()
        self._thread.join()
        for slot in self._slots:
            slot.process.terminate()
        deadline = time.monotonic() + grace_s
        for slot in self._slots:
            try:
                slot.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                slot.process.kill()
                slot.process.wait()
            self._release_jobs(slot)

    def _spawn(self, quick_deaths: int = 0) -> _Slot:
        worker_id = secrets.token_hex(8)
        settings = self._settings
        environ = {f"IMAGED_{name.upper()}": str(value) for name, value in vars(settings).items()}
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        quiet |= waiting(settings.workers, settings.threads, os.environ)
        command = [sys.executable, "-m", "imaged", "worker", "--id", worker_id]
        process = subprocess.Popen(
            [*command, "--parent", str(os.getpid())],
            env={**quiet, **os.environ, **environ},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is the supervisor's to pass on
        )
        return _Slot(process, worker_id, time.monotonic(), quick_deaths)

    def _watch(self) -> None:
        while not self._stopping.wait(POLL_S):
            try:
                for i, slot in enumerate(self._slots):
                    self._slots[i] = self._look_after(slot)
            except Exception:  # whatever it is: without this loop no worker is restarted
                log.exception("looking after the workers failed; looking again")

    def _look_after(self, slot: _Slot) -> _Slot:
        now = time.monotonic()
        if slot.process.poll() is None:
            if self.hangs(slot):
                log.error("worker %s hangs; ending it", slot.worker_id)
                slot.process.kill()
            return slot
        if not slot.released:
            log.warning("worker %s ended (%s)", slot.worker_id, slot.process.returncode)
            self._release_jobs(slot)
            quick = slot.quick_deaths + 1 if now - slot.started < 10 else 0
            slot.quick_deaths, slot.released = quick, True
            slot.restart_at = now + min(MAX_RESTART_S, 0.1 * 2 ** min(quick, 16))
        return self._spawn(slot.quick_deaths) if now >= slot.restart_at else slot

    def _release_jobs(self, slot: _Slot) -> None:
        """Requeue its jobs at once rather than when the lease runs out."""
        with self._db.write() as connection:
            queue.end_lease(
                connection, slot.worker_id, time.time(), self._settings.retention_s, blame=True
            )

    def hangs(self, slot: _Slot) -> bool:
        """Whether it has not beaten for two leases, or its loop has not ticked for hang_s.

        An idle loop ticks too. Until its first checkpoint is loaded, a worker without jobs may take
        any time.
        """
        with self._db.read() as connection:
            row = connection.execute(
                sa.select(workers).where(workers.c.id == slot.worker_id)
            ).first()
            busy = connection.execute(
                sa.select(jobs.c.id).where(jobs.c.worker_id == slot.worker_id).limit(1)
            ).first()
        if row is None:  # reclaimed, or not registered yet
            return slot.registered or time.monotonic() - slot.started > START_S
        slot.registered = True
        now, settings = time.time(), self._settings
        silent = now - row.seen_at > 2 * settings.lease_s
        bound = busy is not None or row.checkpoint is not None
        return silent or (bound and now - row.ticked_at > settings.hang_s)
