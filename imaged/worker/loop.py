"""The worker's loop: claim jobs while there are slots, tick the engines, hand results on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from imaged.catalogue.model import Model, ModelState
from imaged.engine.engine import Engine
from imaged.engine.outcome import Outcome
from imaged.jobs import Job
from imaged.settings import Settings
from imaged.store.blobs import Blobs
from imaged.store.jobs import queue
from imaged.store.sql.database import Database, Watch
from imaged.worker.checkpoint_cache import cache_on_best_device, unavailable
from imaged.worker.crash_loops import recorded_load
from imaged.worker.deliver import Deliveries, Delivery, Stamp
from imaged.worker.heartbeat import Heartbeat
from imaged.worker.jobs import preemption
from imaged.worker.jobs.claiming import Claims
from imaged.worker.jobs.held import HeldJob, HeldJobs
from imaged.worker.snapshots import Snapshots


class Worker:
    """Runs jobs of the checkpoints that are loaded, and loads those that jobs wait for."""

    def __init__(
        self,
        worker_id: str,
        db: Database,
        delivery: Delivery,
        heartbeat: Heartbeat,
        settings: Settings,
    ) -> None:
        self.id, self.db, self.delivery, self.heartbeat = worker_id, db, delivery, heartbeat
        self.settings = settings
        self.stopping, self.time_up = threading.Event(), threading.Event()  # see stop
        self._watch = Watch(db)
        self.checkpoints = cache_on_best_device(settings, recorded_load(db, worker_id))
        self.claims = Claims(worker_id, db, self.checkpoints, settings)
        self.held = HeldJobs()
        writing = ThreadPoolExecutor(1, "delivery")
        self.deliveries = Deliveries(delivery, writing)
        self._snapshots = Snapshots(Blobs(settings.blobs), settings.park_s, writing)

    def run(self) -> None:
        """Run until stopped, then until held jobs are done or the drain time is over."""
        while not self._ended():
            for job_id, epoch in self.lost():
                self.drop(job_id, epoch)
            for job, model in self.claim() or self.preempt():
                self.start(job, model)
            self.arrive()
            self._snapshots.save_due(self.held)
            for outcome in tick(self.checkpoints):
                self.deliver(outcome)
            self.wait_for_work()
        self._save_or_give_back()
        self.checkpoints.close()

    def stop(self, drain_s: float) -> None:
        """Claim no more jobs; finish held ones for `drain_s` seconds at most."""
        if not self.stopping.is_set():
            self.stopping.set()
            timer = threading.Timer(drain_s, self.time_up.set)
            timer.daemon = True
            timer.start()

    def _ended(self) -> bool:
        done = not self.held and not self.deliveries.jobs
        return self.time_up.is_set() or (self.stopping.is_set() and done)

    def load_and_wait(self, model: Model) -> None:
        """Load a model's checkpoint and wait for it, or until told to stop; raises
        CheckpointRefused.
        """
        self.claims.look(time.time())
        self.checkpoints.ask(model.weights)
        self.heartbeat.models = self.claims.model_states()
        while self.checkpoints.state(model.weights) is ModelState.STARTING and not self._ended():
            self.checkpoints.arrive(wait_s=0.1)
        if refusal := self.checkpoints.refusal(model.weights):
            raise refusal
        if self.checkpoints.engine(model.weights):
            self.heartbeat.checkpoint = model.checkpoint_name

    def lost(self) -> set[tuple[str, int]]:
        """(id, epoch) of held jobs that were cancelled, timed out or reclaimed; tells the heartbeat
        how far the others are.

        Known from the heartbeat once a second, and at once when the store has changed.
        """
        self.heartbeat.models = self.claims.model_states()
        lost = self.heartbeat.report(self.held.reports())
        if self._watch.changed():
            self.claims.news = True
            if epochs := self.held.epochs():
                with self.db.read() as connection:
                    gone = queue.lost(connection, self.id, epochs)
                lost |= {(id, epochs[id]) for id in gone}
        return lost

    def drop(self, job_id: str, epoch: int) -> None:
        """Stop a job that was lost, unless it was claimed again since."""
        held = self.held.get(job_id)
        if held is not None and held.job.epoch == epoch:
            self._release(held)
            held.cancel()
            self.deliveries.tidy(held.job)

    def _release(self, held: HeldJob) -> None:
        self.held.remove(held)
        self.claims.news = True  # there is room

    def claim(self) -> list[tuple[Job, Model]]:
        """Jobs for free slots, claimed, with their models."""
        slots = 0 if self.stopping.is_set() else self.settings.slots
        return self.claims.claim(self.held, self.deliveries.jobs, slots)

    def preempt(self) -> list[tuple[Job, Model]]:
        """Without a free slot: claim a short job, and requeue the longest one for it."""
        full = len(self.held) >= self.settings.slots and not self.deliveries.jobs
        if self.stopping.is_set() or not full:
            return []
        chosen = preemption.choose(self.held, self.claims.startable())
        if chosen is None:
            return []
        longest, waiting = chosen
        claimed = self.claims.claim_one(waiting)
        if claimed:
            self._snapshots.save_now(longest)
            self._release(longest)
            longest.cancel()
            self.claims.give_back(longest.job, begun=True)
        return claimed

    def start(self, job: Job, model: Model) -> None:
        """Hand a claimed job to its engine; without one it waits for its checkpoint."""
        engine = self.checkpoints.engine(model.weights)
        self.held.put(HeldJob(job, model, engine))
        if engine is not None:
            engine.cancel(job.id)  # an earlier attempt that was lost and claimed again
            engine.submit(job.id, job.params, job.key_id, self._snapshots.resume_plan(job))
            self.heartbeat.checkpoint = model.checkpoint_name

    def arrive(self) -> None:
        """Take in a loaded checkpoint, and start the jobs that wait for it. After a refusal its
        jobs are given back for another worker, or fail.
        """
        awaiting = self.held.awaiting_checkpoint()
        idle = awaiting and all(engine.idle for engine in self.checkpoints)
        self.checkpoints.arrive(wait_s=0.05 if idle else 0.0)
        for held in awaiting:
            job, model = held.job, held.model
            if self.checkpoints.engine(model.weights):
                self.start(job, model)
            elif self.checkpoints.refusal(model.weights):
                self._release(held)
                if not job.made_in and self.claims.others_may_load(model):
                    self.claims.give_back(job, begun=False)
                else:
                    self.delivery.fail(job, unavailable())
            elif self.checkpoints.fits(model.weights):
                self.checkpoints.ask(model.weights)

    def deliver(self, outcome: Outcome) -> None:
        """Hand an outcome to the delivery thread."""
        held = self.held.get(outcome.job_id)
        assert held is not None and held.engine is not None
        self._release(held)
        stamp = Stamp(held.model.checkpoint_name, self.settings.determinism, held.engine.device)
        self.deliveries.deliver(held.job, outcome, stamp, held.model.weights)

    def wait_for_work(self) -> None:
        """Collect what was delivered; with nothing to do, wait for a change of the store."""
        if self.deliveries.collect(wait_s=0.0 if self.held else 0.05):
            self.claims.news = True  # there may be room
        if not self.held and not self.deliveries.jobs and not self.stopping.is_set():
            self._watch.wait(timeout_s=1.0)

    def _save_or_give_back(self) -> None:
        """At the end: save snapshots of held jobs, and give back those that were not started."""
        for held in self.held:
            if held.engine is None:
                self.claims.give_back(held.job, begun=False)
            else:
                self._snapshots.save_now(held)


def tick(engines: Iterable[Engine]) -> list[Outcome]:
    """One tick of each engine that has something to do."""
    return [outcome for engine in engines if not engine.idle for outcome in engine.tick()]
