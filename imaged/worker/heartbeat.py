"""The heartbeat: renews the worker's lease, writes progress, and learns which jobs were lost."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import sqlalchemy as sa

from imaged.jobs import JobReport
from imaged.store.jobs import queue
from imaged.store.sql.database import Database

log = logging.getLogger(__name__)

BEAT_S = 1.0


class Heartbeat:
    """A thread that beats once a second, also while the device is busy."""

    def __init__(self, db: Database, worker_id: str) -> None:
        self._db, self._worker_id = db, worker_id
        self._lock = threading.Lock()
        self._held: dict[str, JobReport] = {}
        self._shown: dict[str, tuple[int, int]] = {}  # epoch and call of previews in the store
        self._lost: set[tuple[str, int]] = set()
        self._stop = threading.Event()
        self.checkpoint: str | None = None  # the last one that was used
        self.models: Mapping[str, str] = {}  # slug -> state of its checkpoint here
        self.ticked_at = time.time()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Take the lease and keep it."""
        with self._db.write() as connection:
            self._register(connection)
        self._thread.start()

    def _register(self, connection: sa.Connection) -> None:
        queue.register(connection, self._worker_id, os.getpid(), socket.gethostname(), time.time())

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def report(self, held: Mapping[str, JobReport]) -> set[tuple[str, int]]:
        """Take the progress of the loop's jobs, by id; returns (id, epoch) of those that
        were lost.
        """
        with self._lock:
            self._held, self.ticked_at = dict(held), time.time()
            lost, self._lost = self._lost, set()
            return lost

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            self.beat_once()

    def beat_once(self) -> None:
        """Write the last report; an error of the database is logged and tried again at the next."""
        with self._lock:
            held = dict(self._held)
        try:
            with self._db.write() as connection:
                self._beat(connection, self._news(held))
            self._shown = {id: (job.epoch, job.preview_call) for id, job in held.items()}
        except sa.exc.OperationalError as error:
            log.error("the heartbeat could not be written, trying again: %s", error.orig)

    def _news(self, held: Mapping[str, JobReport]) -> dict[str, JobReport]:
        """The report without previews that are stored already."""
        return {
            id: replace(job, preview=None)
            if self._shown.get(id) == (job.epoch, job.preview_call)
            else job
            for id, job in held.items()
        }

    def _beat(self, connection: sa.Connection, held: Mapping[str, JobReport]) -> None:
        seen = (time.time(), self.ticked_at, self.checkpoint)
        lost = queue.beat(connection, self._worker_id, *seen, held, self.models)
        with self._lock:  # before the commit: the loop hears of it before it can claim again
            gone = held if lost is None else lost
            self._lost |= {(job_id, held[job_id].epoch) for job_id in gone}
        if lost is None:  # silent for too long: begin again with nothing
            self._register(connection)
