"""The worker's life: claim while there is room, tick, deliver."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

from imaged.catalogue import Model, Weights
from imaged.engine.load import Nets, as_made, best_device, load
from imaged.engine.outcome import Outcome, Progress
from imaged.errors import CheckpointRefused
from imaged.jobs import Held, Job
from imaged.settings import Settings
from imaged.store import demand, loads, models, queue
from imaged.store.blobs import Blobs
from imaged.store.db import Database, Watch
from imaged.worker.deliver import Delivery, Stamp
from imaged.worker.encode import encode_preview
from imaged.worker.parking import Parking
from imaged.worker.pulse import Pulse
from imaged.worker.residence import on_best_device, unavailable

log = logging.getLogger(__name__)

LOOK_S = 0.5  # how often jobs are looked at that nobody has taken yet
DEFER_S = 2.0  # how long a job is left to a worker that holds its checkpoint
PREEMPT, MOST_PARKS = 4.0, 3  # a job gives way to one of a quarter of its work, and so often
HERE = ("READY", "BUSY")
DEADLY = "Workers died while they loaded it: is there memory enough for it?"


class Worker:
    """Runs the jobs of the checkpoints that it holds, and loads those that others wait for."""

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
        self._look_at = 0.0  # when to look without news
        self._look_full_at = 0.0  # when to look while there is no room
        self._waiting: list[demand.Waiting] = []  # as last looked at
        self._elsewhere: Mapping[str, str] = {}  # models' states on other workers, likewise
        self._held: dict[str, Job] = {}
        self._models: dict[str, Model] = {}  # of the held jobs, as they were when claimed
        self._arriving: set[str] = set()  # held jobs whose checkpoint is on its way
        self._writing = ThreadPoolExecutor(1, "delivery")
        self._saving: Future[None] | None = None
        self._parking = Parking(Blobs(settings.blobs), settings.park_s)
        self._leaving: dict[Future[None], Job] = {}  # what the writing thread has yet to write
        self._offered: Mapping[str, Model] = {}
        self._deadly: Collection[str] = ()  # weights that end workers, as text
        self.residence = on_best_device(settings, self._load)

    def run(self) -> None:
        """Until told to stop, and then until the work in hand is done or time is up."""
        while not self._ended():
            for job_id, epoch in self.lost():
                self.drop(job_id, epoch)
            for job, model in self.claim() or self.preempt():
                self.start(job, model)
            self.arrive()
            self.save()
            for outcome in self.tick():
                self.deliver(outcome)
            self.rest()
        self._let_go()
        self.residence.close()

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
        return self._time_up.is_set() or (self.stopping and not self._held and not self._leaving)

    def hold(self, model: Model) -> None:
        """Wait until a model's checkpoint is on the device, or this worker is told to stop.

        Raises CheckpointRefused.
        """
        with self.db.read() as connection:
            self._offered = models.catalogue(connection)
            self._deadly = loads.deadly(connection, time.time())
        self._shun(self._offered.values())
        self.residence.ask(model.weights)
        self.pulse.models = self._states()
        while self.residence.state(model.weights) == "STARTING" and not self._ended():
            self.residence.arrive(wait_s=0.1)
        if refusal := self.residence.refusal(model.weights):
            raise refusal
        if self.residence.engine(model.weights):
            self.pulse.checkpoint = model.checkpoint_name

    def _load(self, weights: Weights) -> Nets:
        """In the loading thread; it is known what was loading if this worker does not live."""
        with self.db.write() as connection:
            loads.begin(connection, self.id, weights, time.time())
        try:
            return load(weights)
        finally:
            with self.db.write() as connection:
                loads.end(connection, self.id)

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
        """Jobs for the free slots: of the checkpoints at hand, else one that another waits for."""
        now = time.time()
        room = self._room()
        if not (self._news or now > self._look_at) or (room <= 0 and now < self._look_full_at):
            return []
        self._news, self._look_full_at = False, now + LOOK_S
        with self.db.read() as connection:
            self._offered = models.catalogue(connection)
            self._waiting = waiting = demand.fairest(connection, self._offered, now)
            elsewhere = demand.states(connection, now - self.settings.lease_s, self.id)
            self._elsewhere = elsewhere
            self._deadly = loads.deadly(connection, now)
        self._shun(self._offered.values())
        self._look_at = now + LOOK_S if waiting else math.inf
        if room <= 0:
            return []
        here = [w.model for w in waiting if self._state(w.model) in HERE]
        wanted = [w for w in waiting if self._wanted(w, elsewhere, now)]
        late = [w.since for w in wanted if elsewhere.get(w.model) not in HERE]
        late += [self._held[id].created_at for id in self._arriving]  # in types that nobody has
        if self._impatient(late, now):
            here = []  # enough of these: what is under way ends, then there is room
        jobs = self._claim(here, room, now)
        if not jobs:
            fits = [w.model for w in wanted if self._fits(w.model)]
            jobs = self._claim(fits[:1], room, now)
        return [(job, self._offered[job.model]) for job in jobs]

    def _claim(
        self, slugs: Collection[str], room: int, now: float, most_work: float = math.inf
    ) -> list[Job]:
        if not slugs:
            return []
        alone = not self._held and not self._leaving
        with self.db.write() as connection:
            jobs = queue.claim(
                connection, self.id, slugs, room, now, alone=alone, most_work=most_work
            )
        self._held.update((job.id, job) for job in jobs)
        return jobs

    def _room(self) -> int:
        """How many more jobs may be taken."""
        mine = [*self._held.values(), *self._leaving.values()]
        if self.stopping or any(job.attempts > 1 for job in mine):
            return 0  # such a job runs by itself, see queue.claim
        if len(self._leaving) >= self.settings.slots:
            return 0  # finished pictures lie in memory until they are checked and written
        return self.settings.slots - len(self._held)

    def _wanted(self, waiting: demand.Waiting, elsewhere: Mapping[str, str], now: float) -> bool:
        """Whether a checkpoint should be loaded here for this job, and not left to a worker that
        has it; one that was refused here may be well there.
        """
        state, other = self._state(waiting.model), elsewhere.get(waiting.model, "UNAVAILABLE")
        if state in (*HERE, "STARTING"):
            return False
        if state == "UNAVAILABLE":
            refused = self.residence.refusal(self._offered[waiting.model].weights)
            late = waiting.since < now - self.settings.patience_s
            return other == "UNAVAILABLE" or (refused is None and late)
        return other not in HERE or waiting.since < now - DEFER_S

    def _shun(self, offered: Iterable[Model]) -> None:
        """Refuse the weights that end workers, without trying them."""
        for weights in [model.weights for model in offered]:
            known = self.residence.refusal(weights) or self.residence.engine(weights)
            if known is None and str(weights) in self._deadly:
                self.residence.refuse(weights, CheckpointRefused(DEADLY))

    def _impatient(self, waiting_since: list[float], now: float) -> bool:
        """Whether one of these has waited for long; not again just after a checkpoint came."""
        since = min(waiting_since, default=now)
        late = max(since, self.residence.changed_at) < now - self.settings.patience_s
        return late and not self.residence.loading

    def _states(self) -> dict[str, str]:
        return {slug: self._state(slug) for slug in self._offered}

    def _state(self, slug: str) -> str:
        return self.residence.state(self._offered[slug].weights)

    def _fits(self, slug: str) -> bool:
        return self.residence.fits(self._offered[slug].weights)

    def start(self, job: Job, model: Model) -> None:
        """Hand a claimed job to its engine, if that is here; else its checkpoint is to arrive."""
        if job.made_in:
            model = replace(model, weights=as_made(model.weights, job.made_in, best_device()))
            self._shun([model])
        self._models[job.id] = model
        if not self._submit(job):
            self._arriving.add(job.id)

    def arrive(self) -> None:
        """Take in a checkpoint that has been loaded, and start the jobs that wait for it."""
        idle = self._arriving and all(engine.idle for engine in self.residence)
        self.residence.arrive(wait_s=0.05 if idle else 0.0)
        for job_id in list(self._arriving):
            if self._submit(self._held[job_id]):
                self._arriving.remove(job_id)
                continue
            weights = self._models[job_id].weights
            if self.residence.refusal(weights):
                self._refuse(*self._forget(job_id))
            elif self.residence.fits(weights):
                self.residence.ask(weights)

    def _refuse(self, job: Job, model: Model) -> None:
        """The job's checkpoint was refused here: leave it to a worker that may have it."""
        now = time.time()
        with self.db.read() as connection:
            others = demand.states(connection, now - self.settings.lease_s, self.id)
        if job.made_in or others.get(model.slug, "UNAVAILABLE") == "UNAVAILABLE":
            self.delivery.fail(job, unavailable())
            return
        self._give_back(job, begun=False)

    def save(self) -> None:
        """Save what has been under way for a while, in the writing thread; not while it is at it:
        what waits there is held in memory.
        """
        if self._saving is not None and not self._saving.done():
            return
        due = self._parking.due(self._held, time.monotonic())
        states = [(job, self._states_of(job)) for job in due]
        self._saving = self._writing.submit(self._parking.save_all, states) if due else None

    def _let_go(self) -> None:
        """Save what is under way for who goes on with it; give back what was not begun."""
        for job_id, job in self._held.items():
            if job_id in self._arriving:
                self._give_back(job, begun=False)
            else:
                self._save_now(job)

    def _save_now(self, job: Job) -> None:
        if self._saving is not None:
            wait([self._saving])  # it may be writing the same files
        self._parking.save(job, self._states_of(job))

    def _states_of(self, job: Job) -> Mapping[int, bytes]:
        engine = self.residence.engine(self._models[job.id].weights)
        return engine.states(job.id) if engine else {}

    def preempt(self) -> list[tuple[Job, Model]]:
        """A short job that would wait for a slot, in the place of a long one, which is parked.

        Work is counted in what it costs.
        """
        full = len(self._held) >= self.settings.slots and not self._leaving
        if self.stopping or not full or not self._waiting:
            return []
        begun = [job for id, job in self._held.items() if id not in self._arriving]
        left = {job.id: self._left(job) for job in begun if _may_be_parked(job)}
        longest = max(left, key=left.__getitem__, default="")
        for waiting in self._waiting:
            brief = longest and waiting.work * PREEMPT <= left[longest]
            elsewhere = self._elsewhere.get(waiting.model) == "READY"  # there it is taken at once
            if not brief or elsewhere or self._state(waiting.model) not in HERE:
                continue
            self._waiting = []
            jobs = self._claim([waiting.model], 1, time.time(), most_work=waiting.work)
            for _ in jobs:
                self._park(longest)
            return [(job, self._offered[job.model]) for job in jobs]
        return []

    def _left(self, job: Job) -> float:
        """What is left of a job's work, up to where it ends or rests."""
        engine = self.residence.engine(self._models[job.id].weights)
        made = engine.progress().get(job.id) if engine else None
        return job.cost_of(job.unet_calls) * (
            1 - made.calls / made.total if made and made.total else 1
        )

    def _park(self, job_id: str) -> None:
        """Leave a job for later, where it is now."""
        job = self._held[job_id]
        self._save_now(job)
        self._leave(job_id)
        self._give_back(job, begun=True)

    def _give_back(self, job: Job, *, begun: bool) -> None:
        with self.db.write() as connection:
            now, retention_s = time.time(), self.settings.retention_s
            queue.give_back(connection, job, self.id, now, retention_s, begun=begun)

    def _submit(self, job: Job) -> bool:
        """Whether the job's engine is here to take it."""
        model = self._models[job.id]
        engine = self.residence.engine(model.weights)
        if engine is not None:
            engine.cancel(job.id)  # an attempt that we lost and got back
            engine.submit(job.id, job.params, job.key_id, self._parking.course(job))
            self.pulse.checkpoint = model.checkpoint_name
        return engine is not None

    def _forget(self, job_id: str) -> tuple[Job, Model]:
        """The job is not under way here any more."""
        self._arriving.discard(job_id)
        self._news = True  # there is room
        return self._held.pop(job_id), self._models.pop(job_id)

    def tick(self) -> list[Outcome]:
        """One tick of each engine that has something to do."""
        return [o for engine in self.residence if not engine.idle for o in engine.tick()]

    def deliver(self, outcome: Outcome) -> None:
        """Hand the outcome to the writing thread: the loop does not wait for files and commits."""
        job, model = self._forget(outcome.job_id)
        engine = self.residence.engine(model.weights)
        assert engine is not None
        stamp = Stamp(model.checkpoint_name, self.settings.determinism, engine.device)
        future = self._writing.submit(self.delivery.deliver, job, outcome, stamp, model.weights)
        self._leaving[future] = job

    def rest(self) -> None:
        """See what was written; with nothing in hand, wait for something to do."""
        if self._leaving and not self._held:
            wait(self._leaving, 0.05)
        for future in [f for f in self._leaving if f.done()]:
            del self._leaving[future]
            self._news = True  # there may be room
            future.result()  # what kept it from being written ends this worker
        if not self._held and not self._leaving and not self.stopping:
            self._watch.wait(timeout_s=1.0)

    def drop(self, job_id: str, epoch: int) -> None:
        """Forget a job that is ours no more."""
        job = self._held.get(job_id)
        if job is not None and job.epoch == epoch:
            self._leave(job_id)
            self._writing.submit(self.delivery.tidy, job)

    def _leave(self, job_id: str) -> None:
        _, model = self._forget(job_id)
        if engine := self.residence.engine(model.weights):
            engine.cancel(job_id)

    def _progress(self) -> dict[str, Held]:
        self.pulse.models = self._states()
        made = {id: p for engine in self.residence for id, p in engine.progress().items()}
        return {id: _shown(job, made.get(id)) for id, job in self._held.items()}


def _may_be_parked(job: Job) -> bool:
    """Not for ever, and not one that runs by itself for what it may do to others."""
    return job.attempts == 1 and job.epoch - job.attempts < MOST_PARKS


def _shown(job: Job, made: Progress | None) -> Held:
    """What the store is told of a job under way."""
    look = made.preview if made else None
    return Held(
        job.epoch,
        made.calls if made else 0,
        encode_preview(look.rgb, look.width, look.height) if look else None,
        look.call if look else 0,
    )
