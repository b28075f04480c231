"""The worker's life: claim while there is room, tick, deliver."""

from __future__ import annotations

import gc
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from imaged.catalogue import Model
from imaged.engine.engine import Engine, Outcome, Progress
from imaged.engine.load import load
from imaged.errors import CheckpointRefused, JobFailed
from imaged.jobs import Held, Job
from imaged.settings import Settings
from imaged.store import models, queue
from imaged.store.db import Database, Watch
from imaged.worker.deliver import Delivery, Stamp, encode_preview
from imaged.worker.pulse import Pulse

log = logging.getLogger(__name__)

DRAIN_S = 20.0  # how long a stopping worker may finish what it holds


class Worker:
    """Holds one checkpoint at a time and prefers its jobs; takes up another when it is idle."""

    def __init__(
        self,
        worker_id: str,
        db: Database,
        delivery: Delivery,
        pulse: Pulse,
        settings: Settings,
    ) -> None:
        self.id, self.db, self.delivery, self.pulse = worker_id, db, delivery, pulse
        self.settings = settings
        self._stopping, self._time_up = threading.Event(), threading.Event()
        self._watch = Watch(db)
        self._news = True  # somebody has written since we last looked for jobs
        self._held: dict[str, Job] = {}
        self._writing = ThreadPoolExecutor(1, "delivery")
        self._leaving: dict[Future[None], Job] = {}  # what the writing thread has yet to write
        self._engine: Engine | None = None
        self._model: Model | None = None  # whose checkpoint the engine holds

    def run(self) -> None:
        """Until told to stop, and then until the work in hand is done or time is up."""
        while not self._ended():
            for job_id, epoch in self.lost():
                self.drop(job_id, epoch)
            for job, model in self.claim():
                self.start(job, model)
            for outcome in self.tick():
                self.deliver(outcome)
            self.rest()

    def stop(self, drain_s: float) -> None:
        """Claim no more; finish what is held, for `drain_s` at most."""
        if not self._stopping.is_set():
            self._stopping.set()
            timer = threading.Timer(drain_s, self._time_up.set)
            timer.daemon = True
            timer.start()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def _ended(self) -> bool:
        if self.pulse.orphaned:
            self.stop(drain_s=DRAIN_S)
        return self._time_up.is_set() or (self.stopping and not self._held and not self._leaving)

    def hold(self, model: Model) -> None:
        """Put a model's checkpoint on the device; raises CheckpointRefused."""
        if self._model is None or self._model.checkpoint != model.checkpoint:
            if self._engine:
                self._engine.close()
            self._engine = self._model = None
            gc.collect()  # the old nets are in cycles, and leave before the new ones come
            log.info("loading %s", model.checkpoint_name)
            self._engine = Engine(
                load(Path(model.checkpoint)),
                exact=self.settings.determinism == "exact",
                graphs=self.settings.graphs == "on",
                previews=not self.settings.checker,  # nothing is shown that was not checked
            )
        self._model = model
        self.pulse.checkpoint = model.checkpoint_name

    def lost(self) -> set[tuple[str, int]]:
        """(id, epoch) of jobs that are ours no more: cancelled, timed out or reclaimed.

        The heartbeat hears of them once a second; when somebody has written to the store, a look
        between two calls does at once.
        """
        lost = self.pulse.report(self._progress())
        changed = self._watch.changed()
        self._news = self._news or changed
        if changed and self._held:
            epochs = {id: job.epoch for id, job in self._held.items()}
            with self.db.read() as connection:
                gone = queue.lost(connection, self.id, epochs)
            lost |= {(id, epochs[id]) for id in gone}
        return lost

    def claim(self) -> list[tuple[Job, Model]]:
        """Jobs for the free slots: of the checkpoint at hand, or when idle one of any."""
        mine = [*self._held.values(), *self._leaving.values()]
        room = self.settings.slots - len(self._held)
        if any(job.attempts > 1 for job in mine):
            room = 0  # it runs by itself, see queue.claim
        if len(self._leaving) >= self.settings.slots:
            room = 0  # finished pictures lie in memory until they are checked and written
        if self.stopping or room <= 0 or not self._news:
            return []
        self._news = False
        with self.db.read() as connection:
            offered = models.catalogue(connection)
            if not queue.depth(connection):
                return []
        at_hand = [m.slug for m in offered.values() if self._holds(m)]
        with self.db.write() as connection:
            jobs = queue.claim(connection, self.id, at_hand, room, time.time(), alone=not mine)
            if not jobs and not mine:
                jobs = queue.claim(connection, self.id, list(offered), 1, time.time())
        self._held.update((job.id, job) for job in jobs)
        return [(job, offered[job.model]) for job in jobs]

    def start(self, job: Job, model: Model) -> None:
        """Hand a claimed job to the engine, with its checkpoint loaded."""
        try:
            self.hold(model)
        except CheckpointRefused as error:
            log.error("%s: %s", job.model, error.detail)
            self.delivery.fail(
                self._held.pop(job.id),
                JobFailed("model_unavailable", "the model's checkpoint could not be loaded"),
            )
            return
        assert self._engine is not None
        self._engine.cancel(job.id)  # an attempt that we lost and got back
        self._engine.submit(job.id, job.params, job.key_id)

    def tick(self) -> list[Outcome]:
        return self._engine.tick() if self._engine and not self._engine.idle else []

    def deliver(self, outcome: Outcome) -> None:
        """Hand the outcome to the writing thread: the loop does not wait for files and commits."""
        assert self._model is not None and self._engine is not None
        job = self._held.pop(outcome.job_id)
        stamp = Stamp(self._model.checkpoint_name, self.settings.determinism, self._engine.device)
        future = self._writing.submit(self.delivery.deliver, job, outcome, stamp)
        self._leaving[future] = job

    def rest(self) -> None:
        """See what was written; with nothing in hand, wait for something to do."""
        if self._leaving and not self._held:
            wait(self._leaving, 0.05)
        for future in [f for f in self._leaving if f.done()]:
            del self._leaving[future]
            future.result()  # what kept it from being written ends this worker
        if not self._held and not self._leaving and not self.stopping:
            self._watch.wait(timeout_s=1.0)

    def drop(self, job_id: str, epoch: int) -> None:
        """Forget a job that is ours no more."""
        job = self._held.get(job_id)
        if job is not None and job.epoch == epoch and self._engine:
            del self._held[job_id]
            self._engine.cancel(job_id)

    def _holds(self, model: Model) -> bool:
        return self._model is not None and self._model.checkpoint == model.checkpoint

    def _progress(self) -> dict[str, Held]:
        made = self._engine.progress() if self._engine else {}
        return {id: _shown(job, made.get(id)) for id, job in self._held.items()}


def _shown(job: Job, made: Progress | None) -> Held:
    """What the store is told of a job under way."""
    look = made.preview if made else None
    return Held(
        job.epoch,
        made.calls if made else 0,
        encode_preview(look.rgb, look.width, look.height) if look else None,
        look.call if look else 0,
    )
