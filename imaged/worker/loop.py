"""The worker's loop: claim jobs while there are slots, tick the engines, hand results on."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

from imaged.catalogue.model import Model, ModelState
from imaged.engine.loading.load import best_device, with_dtypes
from imaged.engine.outcome import Outcome, Progress
from imaged.jobs import Job, JobReport
from imaged.settings import Settings
from imaged.store import catalogue
from imaged.store.blobs import Blobs
from imaged.store.jobs import load_failures, model_demand, queue
from imaged.store.sql.database import Database, Watch
from imaged.worker.checkpoint_cache import cache_on_best_device, unavailable
from imaged.worker.crash_loops import recorded_load, refuse_crashing
from imaged.worker.deliver import Delivery, Stamp
from imaged.worker.encode import encode_preview
from imaged.worker.heartbeat import Heartbeat
from imaged.worker.snapshots import Snapshots

log = logging.getLogger(__name__)

POLL_S = 0.5  # seconds between two looks at waiting jobs that nobody has claimed
DEFER_S = 2.0  # a job is left so long to workers that have its checkpoint loaded
PREEMPT_RATIO = 4.0  # a job is parked for one of a quarter of its work
MAX_PREEMPTIONS = 3  # of one job
UNAVAILABLE, UNLOADED = ModelState.UNAVAILABLE, ModelState.UNLOADED


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
        self._stopping, self._time_up = threading.Event(), threading.Event()
        self._watch = Watch(db)
        self._news = True  # the store has changed since jobs were last looked for
        self._poll_at = 0.0  # when to look without a change
        self._poll_full_at = 0.0  # when to look without a free slot
        self._waiting: list[model_demand.FirstWaiting] = []  # as last read
        self._elsewhere: Mapping[str, ModelState] = {}  # models' states on other workers, likewise
        self._held: dict[str, Job] = {}
        self._models: dict[str, Model] = {}  # of held jobs, as of their claim
        self._awaiting_checkpoint: set[str] = set()  # held jobs whose checkpoint is being loaded
        self._writing = ThreadPoolExecutor(1, "delivery")
        self._saving: Future[None] | None = None
        self._snapshots = Snapshots(Blobs(settings.blobs), settings.park_s)
        self._delivering: dict[Future[None], Job] = {}  # outcomes in the delivery thread
        self._offered: Mapping[str, Model] = {}
        self._crashing: Collection[str] = ()  # weights that crash workers, as text
        self.checkpoints = cache_on_best_device(settings, recorded_load(db, worker_id))

    def run(self) -> None:
        """Run until stopped, then until held jobs are done or the drain time is over."""
        while not self._ended():
            for job_id, epoch in self.lost():
                self.drop(job_id, epoch)
            for job, model in self.claim() or self.preempt():
                self.start(job, model)
            self.arrive()
            self.save()
            for outcome in self.tick():
                self.deliver(outcome)
            self.wait_for_work()
        self._save_or_give_back()
        self.checkpoints.close()

    def stop(self, drain_s: float) -> None:
        """Claim no more jobs; finish held ones for `drain_s` seconds at most."""
        if not self._stopping.is_set():
            self._stopping.set()
            timer = threading.Timer(drain_s, self._time_up.set)
            timer.daemon = True
            timer.start()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def _ended(self) -> bool:
        return self._time_up.is_set() or (self.stopping and not self._held and not self._delivering)

    def load_and_wait(self, model: Model) -> None:
        """Load a model's checkpoint and wait for it, or until told to stop; raises
        CheckpointRefused.
        """
        with self.db.read() as connection:
            self._offered = catalogue.catalogue(connection)
            self._crashing = load_failures.crashing(connection, time.time())
        self._refuse_crashing(self._offered.values())
        self.checkpoints.ask(model.weights)
        self.heartbeat.models = self._model_states()
        while self.checkpoints.state(model.weights) is ModelState.STARTING and not self._ended():
            self.checkpoints.arrive(wait_s=0.1)
        if refusal := self.checkpoints.refusal(model.weights):
            raise refusal
        if self.checkpoints.engine(model.weights):
            self.heartbeat.checkpoint = model.checkpoint_name

    def lost(self) -> set[tuple[str, int]]:
        """(id, epoch) of held jobs that were cancelled, timed out or reclaimed.

        Known from the heartbeat once a second, and at once when the store has changed.
        """
        lost = self.heartbeat.report(self._progress())
        changed = self._watch.changed()
        self._news = self._news or changed
        if changed and self._held:
            epochs = {id: job.epoch for id, job in self._held.items()}
            with self.db.read() as connection:
                gone = queue.lost(connection, self.id, epochs)
            lost |= {(id, epochs[id]) for id in gone}
        return lost

    def claim(self) -> list[tuple[Job, Model]]:
        """Claim jobs for free slots: of loaded checkpoints, else of the first in fair order whose
        checkpoint fits.
        """
        now = time.time()
        room = self._room()
        if not (self._news or now > self._poll_at) or (room <= 0 and now < self._poll_full_at):
            return []
        self._news, self._poll_full_at = False, now + POLL_S
        with self.db.read() as connection:
            self._offered = catalogue.catalogue(connection)
            self._waiting = waiting = model_demand.fairest(connection, self._offered, now)
            elsewhere = model_demand.states(connection, now - self.settings.lease_s, self.id)
            self._elsewhere = elsewhere
            self._crashing = load_failures.crashing(connection, now)
        self._refuse_crashing(self._offered.values())
        self._poll_at = now + POLL_S if waiting else math.inf
        if room <= 0:
            return []
        here = [w.model for w in waiting if self._state(w.model).loaded]
        wanted = [w for w in waiting if self._wanted(w, elsewhere, now)]
        late = [w.since for w in wanted if not elsewhere.get(w.model, UNLOADED).loaded]
        late += [self._held[id].created_at for id in self._awaiting_checkpoint]
        if self._overdue(late, now):
            here = []  # so that a loaded checkpoint becomes idle and can be evicted
        jobs = self._claim(here, room)
        if not jobs:
            fit = [w.model for w in wanted if self.checkpoints.fits(self._offered[w.model].weights)]
            jobs = self._claim(fit[:1], room)
        return [(job, self._offered[job.model]) for job in jobs]

    def _claim(self, slugs: Collection[str], room: int, most_work: float = math.inf) -> list[Job]:
        if not slugs:
            return []
        alone = not self._held and not self._delivering
        with self.db.write() as connection:
            # The time with the lock: no job is older than its claim.
            jobs = queue.claim(
                connection, self.id, slugs, room, time.time(), alone=alone, most_work=most_work
            )
        self._held.update((job.id, job) for job in jobs)
        return jobs

    def _room(self) -> int:
        """Free slots."""
        mine = [*self._held.values(), *self._delivering.values()]
        if self.stopping or any(job.attempts > 1 for job in mine):
            return 0  # after a crash a job runs alone, see queue.claim
        if len(self._delivering) >= self.settings.slots:
            return 0  # results are held in memory until they are written
        return self.settings.slots - len(self._held)

    def _wanted(
        self, waiting: model_demand.FirstWaiting, elsewhere: Mapping[str, ModelState], now: float
    ) -> bool:
        """Whether to load a checkpoint here for a waiting job, rather than leave it to a worker
        that has it loaded, or that may load what was refused here.
        """
        state, other = self._state(waiting.model), elsewhere.get(waiting.model, UNAVAILABLE)
        if state.loaded or state is ModelState.STARTING:
            return False
        if state is UNAVAILABLE:
            refused = self.checkpoints.refusal(self._offered[waiting.model].weights)
            late = waiting.since < now - self.settings.patience_s
            return other is UNAVAILABLE or (refused is None and late)
        return not other.loaded or waiting.since < now - DEFER_S

    def _refuse_crashing(self, offered: Iterable[Model]) -> None:
        refuse_crashing(self.checkpoints, [model.weights for model in offered], self._crashing)

    def _overdue(self, waiting_since: list[float], now: float) -> bool:
        """Whether a job for an unloaded checkpoint has waited longer than patience_s, since it came
        or since the last load.
        """
        since = min(waiting_since, default=now)
        late = max(since, self.checkpoints.changed_at) < now - self.settings.patience_s
        return late and not self.checkpoints.loading

    def _model_states(self) -> dict[str, ModelState]:
        return {slug: self._state(slug) for slug in self._offered}

    def _state(self, slug: str) -> ModelState:
        return self.checkpoints.state(self._offered[slug].weights)

    def start(self, job: Job, model: Model) -> None:
        """Hand a claimed job to its engine; without one it waits for its checkpoint."""
        if job.made_in:
            model = replace(model, weights=with_dtypes(model.weights, job.made_in, best_device()))
            self._refuse_crashing([model])
        self._models[job.id] = model
        if not self._submit(job):
            self._awaiting_checkpoint.add(job.id)

    def arrive(self) -> None:
        """Take in a loaded checkpoint, and start the jobs that wait for it."""
        idle = self._awaiting_checkpoint and all(engine.idle for engine in self.checkpoints)
        self.checkpoints.arrive(wait_s=0.05 if idle else 0.0)
        for job_id in list(self._awaiting_checkpoint):
            if self._submit(self._held[job_id]):
                self._awaiting_checkpoint.remove(job_id)
                continue
            weights = self._models[job_id].weights
            if self.checkpoints.refusal(weights):
                self._refuse(*self._pop(job_id))
            elif self.checkpoints.fits(weights):
                self.checkpoints.ask(weights)

    def _refuse(self, job: Job, model: Model) -> None:
        """After its checkpoint was refused: give the job back for another worker, or fail it."""
        now = time.time()
        with self.db.read() as connection:
            others = model_demand.states(connection, now - self.settings.lease_s, self.id)
        if job.made_in or others.get(model.slug, UNAVAILABLE) is UNAVAILABLE:
            self.delivery.fail(job, unavailable())
            return
        self._give_back(job, begun=False)

    def save(self) -> None:
        """In the delivery thread, save snapshots of the jobs that are due, one batch at a time."""
        if self._saving is not None and not self._saving.done():
            return
        due = self._snapshots.due(self._held, time.monotonic())
        taken = [(job, self._snapshots_of(job)) for job in due]
        self._saving = self._writing.submit(self._snapshots.save_all, taken) if due else None

    def _save_or_give_back(self) -> None:
        """At the end: save snapshots of held jobs, and give back those that were not started."""
        for job_id, job in self._held.items():
            if job_id in self._awaiting_checkpoint:
                self._give_back(job, begun=False)
            else:
                self._save_now(job)

    def _save_now(self, job: Job) -> None:
        if self._saving is not None:
            wait([self._saving])  # it may write the same files
        self._snapshots.save(job, self._snapshots_of(job))

    def _snapshots_of(self, job: Job) -> Mapping[int, bytes]:
        engine = self.checkpoints.engine(self._models[job.id].weights)
        return engine.snapshots(job.id) if engine else {}

    def preempt(self) -> list[tuple[Job, Model]]:
        """Without a free slot: park the job with the most work left for a waiting one with much
        less. Work is measured by price.
        """
        full = len(self._held) >= self.settings.slots and not self._delivering
        if self.stopping or not full or not self._waiting:
            return []
        begun = [job for id, job in self._held.items() if id not in self._awaiting_checkpoint]
        left = {job.id: self._left(job) for job in begun if _preemptible(job)}
        longest = max(left, key=left.__getitem__, default="")
        for waiting in self._waiting:
            brief = longest and waiting.work * PREEMPT_RATIO <= left[longest]
            # An idle worker that has the checkpoint will claim it.
            elsewhere = self._elsewhere.get(waiting.model) is ModelState.READY
            if not brief or elsewhere or not self._state(waiting.model).loaded:
                continue
            self._waiting = []
            jobs = self._claim([waiting.model], 1, waiting.work)
            for _ in jobs:
                self._requeue(longest)
            return [(job, self._offered[job.model]) for job in jobs]
        return []

    def _left(self, job: Job) -> float:
        """Work left of a job, in micro-dollars, up to its end or to where its draft rests."""
        engine = self.checkpoints.engine(self._models[job.id].weights)
        made = engine.progress().get(job.id) if engine else None
        share = 1 - made.calls / made.total if made and made.total else 1
        return job.cost_of(job.unet_calls) * share

    def _requeue(self, job_id: str) -> None:
        """Save a job's snapshots and give it back."""
        job = self._held[job_id]
        self._save_now(job)
        self._remove(job_id)
        self._give_back(job, begun=True)

    def _give_back(self, job: Job, *, begun: bool) -> None:
        with self.db.write() as connection:
            now, retention_s = time.time(), self.settings.retention_s
            queue.give_back(connection, job, self.id, now, retention_s, begun=begun)

    def _submit(self, job: Job) -> bool:
        """Submit to the job's engine; False if its checkpoint is not loaded."""
        model = self._models[job.id]
        engine = self.checkpoints.engine(model.weights)
        if engine is not None:
            engine.cancel(job.id)  # an earlier attempt that was lost and claimed again
            engine.submit(job.id, job.params, job.key_id, self._snapshots.resume_plan(job))
            self.heartbeat.checkpoint = model.checkpoint_name
        return engine is not None

    def _pop(self, job_id: str) -> tuple[Job, Model]:
        """Forget a held job; returns it and its model."""
        self._awaiting_checkpoint.discard(job_id)
        self._news = True  # there is room
        return self._held.pop(job_id), self._models.pop(job_id)

    def tick(self) -> list[Outcome]:
        """One tick of each engine that has something to do."""
        return [o for engine in self.checkpoints if not engine.idle for o in engine.tick()]

    def deliver(self, outcome: Outcome) -> None:
        """Hand an outcome to the delivery thread: the loop does not wait for files and commits."""
        job, model = self._pop(outcome.job_id)
        engine = self.checkpoints.engine(model.weights)
        assert engine is not None
        stamp = Stamp(model.checkpoint_name, self.settings.determinism, engine.device)
        future = self._writing.submit(self.delivery.deliver, job, outcome, stamp, model.weights)
        self._delivering[future] = job

    def wait_for_work(self) -> None:
        """Collect what was delivered; with nothing to do, wait for a change of the store."""
        if self._delivering and not self._held:
            wait(self._delivering, 0.05)
        for future in [f for f in self._delivering if f.done()]:
            del self._delivering[future]
            self._news = True  # there may be room
            future.result()  # an error in delivery ends this worker
        if not self._held and not self._delivering and not self.stopping:
            self._watch.wait(timeout_s=1.0)

    def drop(self, job_id: str, epoch: int) -> None:
        """Stop a job that was lost, unless it was claimed again since."""
        job = self._held.get(job_id)
        if job is not None and job.epoch == epoch:
            self._remove(job_id)
            self._writing.submit(self.delivery.tidy, job)

    def _remove(self, job_id: str) -> None:
        _, model = self._pop(job_id)
        if engine := self.checkpoints.engine(model.weights):
            engine.cancel(job_id)

    def _progress(self) -> dict[str, JobReport]:
        self.heartbeat.models = self._model_states()
        made = {id: p for engine in self.checkpoints for id, p in engine.progress().items()}
        return {id: _shown(job, made.get(id)) for id, job in self._held.items()}


def _preemptible(job: Job) -> bool:
    """Whether a job may be preempted: under MAX_PREEMPTIONS times, and not one that runs alone."""
    return job.attempts == 1 and job.epoch - job.attempts < MAX_PREEMPTIONS


def _shown(job: Job, made: Progress | None) -> JobReport:
    """A job's progress as the heartbeat reports it."""
    look = made.preview if made else None
    return JobReport(
        job.epoch,
        made.calls if made else 0,
        encode_preview(look.rgb, look.width, look.height) if look else None,
        look.call if look else 0,
    )
