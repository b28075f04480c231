"""The thread that keeps the lease alive while the device is busy, and hears of cancels."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import sqlalchemy as sa

from imaged.jobs import Held
from imaged.store import queue
from imaged.store.db import Database

log = logging.getLogger(__name__)

BEAT_S = 1.0


class Pulse:
    """Beats once a second. The loop reports to it and asks it which jobs it has lost."""

    def __init__(self, db: Database, worker_id: str) -> None:
        self._db, self._worker_id = db, worker_id
        self._lock = threading.Lock()
        self._held: dict[str, Held] = {}
        self._shown: dict[str, tuple[int, int]] = {}  # epoch and call of previews in the store
        self._lost: set[tuple[str, int]] = set()
        self._stop = threading.Event()
        self.checkpoint: str | None = None  # the last one that was held
        self.models: Mapping[str, str] = {}  # slug -> state of its checkpoint here
        self.ticked_at = time.time()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

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

    def report(self, held: Mapping[str, Held]) -> set[tuple[str, int]]:
        """The loop's jobs by id, each with its newest preview; returns (id, epoch) of lost ones."""
        with self._lock:
            self._held, self.ticked_at = dict(held), time.time()
            lost, self._lost = self._lost, set()
            return lost

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            self.beat_once()

    def beat_once(self) -> None:
        """Write what was last reported; a database that does not answer is asked again later."""
        with self._lock:
            held = dict(self._held)
        try:
            with self._db.write() as connection:
                self._beat(connection, self._news(held))
            self._shown = {id: (job.epoch, job.preview_call) for id, job in held.items()}
        except sa.exc.OperationalError as error:
            log.error("the heartbeat could not be written, trying again: %s", error.orig)

    def _news(self, held: Mapping[str, Held]) -> dict[str, Held]:
        """The same without the previews that the store already has."""
        return {
            id: replace(job, preview=None)
            if self._shown.get(id) == (job.epoch, job.preview_call)
            else job
            for id, job in held.items()
        }

    def _beat(self, connection: sa.Connection, held: Mapping[str, Held]) -> None:
        lost = queue.beat(
            connection,
            self._worker_id,
            time.time(),
            self.ticked_at,
            self.checkpoint,
            held,
            self.models,
        )
        with self._lock:  # before the commit: the loop hears of it before it can claim again
            gone = held if lost is None else lost
            self._lost |= {(job_id, held[job_id].epoch) for job_id in gone}
        if lost is None:  # silent for too long: begin again with nothing
            self._register(connection)
