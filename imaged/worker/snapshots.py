"""Snapshots of jobs under way, saved as files: another worker resumes where this one stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, wait

from imaged.engine.snapshot import RunPlan
from imaged.jobs import MAX_ATTEMPTS, Job
from imaged.store.blobs import Blobs
from imaged.worker.jobs.held import HeldJob

log = logging.getLogger(__name__)


class Snapshots:
    """Saves and reads snapshots.

    every_s: seconds between two of a job; 0: none are taken.
    writing: the delivery thread, which also deletes these files.
    """

    def __init__(self, blobs: Blobs, every_s: float, writing: Executor) -> None:
        self._blobs, self._every_s, self._writing = blobs, every_s, writing
        self._saved: dict[str, float] = {}  # when each job in hand was last saved, or begun
        self._saving: Future[None] | None = None

    def save_due(self, jobs: Iterable[HeldJob]) -> None:
        """Save the jobs that are due in the delivery thread, one batch at a time."""
        if self._saving is not None and not self._saving.done():
            return
        taken = [(held.job, held.snapshots()) for held in self.due(jobs, time.monotonic())]
        self._saving = self._writing.submit(self._save_all, taken) if taken else None

    def save_now(self, held: HeldJob) -> None:
        if self._saving is not None:
            wait([self._saving])  # it may write the same files
        self.save(held.job, held.snapshots())

    def due(self, jobs: Iterable[HeldJob], now: float) -> list[HeldJob]:
        """The jobs whose last snapshot, or start, is every_s old; now: monotonic seconds."""
        held = {one.job.id: one for one in jobs}
        self._saved = {job_id: self._saved.get(job_id, now) for job_id in held}
        if not self._every_s:
            return []
        late = [job_id for job_id in held if self._saved[job_id] <= now - self._every_s]
        self._saved.update((job_id, now) for job_id in late)
        return [held[job_id] for job_id in late]

    def save(self, job: Job, snapshots: Mapping[int, bytes]) -> None:
        """Write a job's snapshots. A failure is logged: a crash then costs more work,
        nothing else.
        """
        try:
            for sample, content in snapshots.items():
                self._blobs.put(f"{job.id}-{job.epoch}-{sample}.state", content)
        except OSError as error:
            log.error("job %s: its state was not saved: %s", job.id, error)

    def _save_all(self, snapshots: Sequence[tuple[Job, Mapping[int, bytes]]]) -> None:
        for job, of_job in snapshots:
            self.save(job, of_job)

    def resume_plan(self, job: Job) -> RunPlan:
        """From where a claimed job resumes, and how far it runs."""
        draft = job.draft
        if draft and draft.samples:
            return RunPlan(0, draft.samples, self._newest(job), draft.varied)
        return RunPlan(draft.steps if draft else 0, snapshots=self._newest(job))

    def _newest(self, job: Job) -> dict[int, bytes]:
        """The newest snapshot of each image. The last attempt after crashes starts anew, in case a
        snapshot causes them.
        """
        if job.epoch == 1 or (
            job.attempts == MAX_ATTEMPTS and not (job.draft and job.draft.varied)
        ):
            return {}
        found: dict[int, bytes] = {}
        for name in self._blobs.snapshots_of(job.id):
            content = self._blobs.read(name)
            if content is not None:
                found[int(name[: -len(".state")].rpartition("-")[2])] = content
        return found
