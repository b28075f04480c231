"""Claims of a worker: when it looks for waiting jobs, and for which checkpoints it claims them."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import replace

from imaged.catalogue.model import Model, ModelState
from imaged.engine.loading.load import best_device, with_dtypes
from imaged.jobs import Job
from imaged.settings import Settings
from imaged.store import catalogue
from imaged.store.jobs import load_failures, queue
from imaged.store.jobs.model_demand import FirstWaiting, fairest, states
from imaged.store.sql.database import Database
from imaged.worker.checkpoint_cache import CheckpointCache
from imaged.worker.crash_loops import refuse_crashing
from imaged.worker.jobs.held import HeldJobs

POLL_S = 0.5  # seconds between two looks at waiting jobs that nobody has claimed
DEFER_S = 2.0  # a job is left so long to workers that have its checkpoint loaded
UNAVAILABLE, UNLOADED = ModelState.UNAVAILABLE, ModelState.UNLOADED


def free_slots(held: HeldJobs, delivering: Collection[Job], slots: int) -> int:
    """How many jobs there is room for; none, or less, if there are as many as `slots`."""
    if any(job.attempts > 1 for job in [*(one.job for one in held), *delivering]):
        return 0  # after a crash a job runs alone, see queue.claim
    if len(delivering) >= slots:
        return 0  # results are held in memory until they are written
    return slots - len(held)


class Claims:
    """Claims jobs in a worker's name, and gives them back.

    news:    the store has changed, or there is room, since jobs were last looked for.
    offered: models by slug, as last read.
    """

    def __init__(
        self, worker_id: str, db: Database, checkpoints: CheckpointCache, settings: Settings
    ) -> None:
        self._worker_id, self._db, self._checkpoints = worker_id, db, checkpoints
        self._settings = settings
        self.news = True
        self.offered: Mapping[str, Model] = {}
        self._waiting: list[FirstWaiting] = []  # as last read
        self._elsewhere: Mapping[str, ModelState] = {}  # models' states on other workers, likewise
        self._crashing: Collection[str] = ()  # weights that crash workers, as text, likewise
        self._poll_at = 0.0  # when to look without news
        self._poll_full_at = 0.0  # when to look without a free slot

    def look(self, now: float) -> None:
        """Read what is offered and what waits; refuse what crashes workers."""
        with self._db.read() as connection:
            self.offered = catalogue.catalogue(connection)
            self._waiting = fairest(connection, self.offered, now)
            self._elsewhere = states(connection, now - self._settings.lease_s, self._worker_id)
            self._crashing = load_failures.crashing(connection, now)
        offered = [model.weights for model in self.offered.values()]
        refuse_crashing(self._checkpoints, offered, self._crashing)

    def claim(
        self, held: HeldJobs, delivering: Collection[Job], slots: int
    ) -> list[tuple[Job, Model]]:
        """Claim jobs for free slots: of loaded checkpoints, else of the first in fair order whose
        checkpoint fits.
        """
        now, room = time.time(), free_slots(held, delivering, slots)
        if not (self.news or now > self._poll_at) or (room <= 0 and now < self._poll_full_at):
            return []
        self.news, self._poll_full_at = False, now + POLL_S
        self.look(now)
        self._poll_at = now + POLL_S if self._waiting else math.inf
        if room <= 0:
            return []
        alone = not held and not delivering
        wanted = [w for w in self._waiting if self._wanted(w, now)]
        late = [w.since for w in wanted if not self._elsewhere.get(w.model, UNLOADED).loaded]
        late += [one.job.created_at for one in held.awaiting_checkpoint()]
        here = [w.model for w in self._waiting if self._state(w.model).loaded]
        if self._overdue(late, now):
            here = []  # so that a loaded checkpoint becomes idle and can be evicted
        jobs = self._claim(here, room, alone=alone)
        if not jobs:
            fits = self._checkpoints.fits
            fit = [w.model for w in wanted if fits(self.offered[w.model].weights)]
            jobs = self._claim(fit[:1], room, alone=alone)
        return jobs

    def startable(self) -> list[FirstWaiting]:
        """Of the jobs that waited at the last look: those of checkpoints loaded here, without those
        that an idle worker will claim, as it has the checkpoint too.
        """
        return [
            first
            for first in self._waiting
            if self._elsewhere.get(first.model) is not ModelState.READY
            and self._state(first.model).loaded
        ]

    def claim_one(self, first: FirstWaiting) -> list[tuple[Job, Model]]:
        """Claim the first waiting job of this one's model, if it costs no more, beside running
        jobs; none if another worker was faster. Until the next look nothing is startable.
        """
        self._waiting = []
        return self._claim([first.model], 1, alone=False, most_work=first.work)

    def give_back(self, job: Job, *, begun: bool) -> None:
        """Requeue a claimed job. begun: whether an engine had it."""
        with self._db.write() as connection:
            now, retention_s = time.time(), self._settings.retention_s
            queue.give_back(connection, job, self._worker_id, now, retention_s, begun=begun)

    def others_may_load(self, model: Model) -> bool:
        """Whether there is another worker that has not refused this model's checkpoint."""
        oldest = time.time() - self._settings.lease_s
        with self._db.read() as connection:
            others = states(connection, oldest, self._worker_id)
        return others.get(model.slug, UNAVAILABLE) is not UNAVAILABLE

    def model_states(self) -> dict[str, ModelState]:
        """State here of each model that is offered."""
        return {slug: self._state(slug) for slug in self.offered}

    def _state(self, slug: str) -> ModelState:
        return self._checkpoints.state(self.offered[slug].weights)

    def _claim(
        self, slugs: Collection[str], room: int, *, alone: bool, most_work: float = math.inf
    ) -> list[tuple[Job, Model]]:
        if not slugs:
            return []
        mine = self._worker_id
        with self._db.write() as connection:
            # The time with the lock: no job is older than its claim.
            jobs = queue.claim(
                connection, mine, slugs, room, time.time(), alone=alone, most_work=most_work
            )
        return [(job, self._model_of(job)) for job in jobs]

    def _model_of(self, job: Job) -> Model:
        """A claimed job's model, in the types that the job is to be made in; these are refused if
        they crash workers.
        """
        model = self.offered[job.model]
        if not job.made_in:
            return model
        weights = with_dtypes(model.weights, job.made_in, best_device())
        refuse_crashing(self._checkpoints, [weights], self._crashing)
        return replace(model, weights=weights)

    def _wanted(self, first: FirstWaiting, now: float) -> bool:
        """Whether to load a checkpoint here for a waiting job, rather than leave it to a worker
        that has it loaded, or that may load what was refused here.
        """
        state, other = self._state(first.model), self._elsewhere.get(first.model, UNAVAILABLE)
        if state.loaded or state is ModelState.STARTING:
            return False
        if state is UNAVAILABLE:
            refused = self._checkpoints.refusal(self.offered[first.model].weights)
            late = first.since < now - self._settings.patience_s
            return other is UNAVAILABLE or (refused is None and late)
        return not other.loaded or first.since < now - DEFER_S

    def _overdue(self, waiting_since: list[float], now: float) -> bool:
        """Whether a job for an unloaded checkpoint has waited longer than patience_s, since it came
        or since the last load.
        """
        since = min(waiting_since, default=now)
        late = max(since, self._checkpoints.changed_at) < now - self._settings.patience_s
        return late and not self._checkpoints.loading
