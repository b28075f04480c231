"""The worker process: take a lease, load the default checkpoint, run, give back what is left."""

from __future__ import annotations

import faulthandler
import logging
import os
import secrets
import signal
import threading
import time

from imaged.catalogue.model import DEFAULT_SLUG
from imaged.engine.loading.load import set_threads
from imaged.errors import CheckpointRefused
from imaged.settings import Settings
from imaged.store import catalogue
from imaged.store.blobs import Blobs
from imaged.store.jobs import queue
from imaged.store.sql.database import Database
from imaged.worker.deliver import Delivery
from imaged.worker.heartbeat import Heartbeat
from imaged.worker.loop import Worker

log = logging.getLogger(__name__)

POLL_S = 1.0  # seconds between two looks at whether the supervisor lives


def main(settings: Settings, worker_id: str | None = None, parent: int | None = None) -> None:
    """Run one worker in this process until SIGTERM or SIGINT.

    `worker_id` and `parent`, its own pid, are given by the supervisor; such a worker stops when
    its supervisor is gone. Told to stop, this process ends within `settings.leave_s`.
    """
    worker_id = worker_id or secrets.token_hex(8)
    set_threads(settings.threads)
    db = Database(settings.database)
    heartbeat = Heartbeat(db, worker_id)
    delivery = Delivery(db, Blobs(settings.blobs), worker_id, settings)
    worker = Worker(worker_id, db, delivery, heartbeat, settings)
    _stop_on_signal(worker)
    _watch(worker, parent)
    heartbeat.start()
    died = True
    try:
        _warm_up(worker)
        worker.run()
        died = False
    finally:
        heartbeat.stop()
        with db.write() as connection:
            given_back = queue.end_lease(
                connection, worker_id, time.time(), settings.retention_s, blame=died
            )
        log.info("worker %s stopped; %d jobs given back", worker_id, given_back)


def _warm_up(worker: Worker) -> None:
    """Load the default checkpoint before the first job; if it is refused, others still serve."""
    with worker.db.read() as connection:
        model = catalogue.catalogue(connection)[DEFAULT_SLUG]
    try:
        worker.load_and_wait(model)
    except CheckpointRefused as error:
        log.error("%s: %s", model.slug, error.detail)


def _stop_on_signal(worker: Worker) -> None:
    """The first signal asks to finish what is held, the second to leave now."""

    def stop(*_: object) -> None:
        if worker.stopping.is_set():
            raise SystemExit(1)
        _stop(worker)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _watch(worker: Worker, parent: int | None) -> None:
    """Stop when the supervisor is gone: nobody would restart or end this worker. End the process
    when no thread runs at all, which a supervisor would notice sooner.
    """
    silent_s = 2 * worker.settings.lease_s + worker.settings.leave_s

    def look() -> None:
        while parent in (None, os.getppid()) and not worker.stopping.is_set():
            _leave_after(silent_s)  # restarts the timer
            time.sleep(POLL_S)
        _stop(worker)

    threading.Thread(target=look, name="watch", daemon=True).start()


def _stop(worker: Worker) -> None:
    """Drain, with a limit to how long that may take; then the lease runs out."""
    worker.stop(worker.settings.drain_s)
    _leave_after(worker.settings.leave_s)


def _leave_after(seconds: float) -> None:
    """End this process then, with a traceback of every thread. A C timer does it: a read from a
    disk that does not answer may hold the GIL for ever.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)
