"""The jobs that a worker holds, from their claim until it hands on their outcome or loses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from imaged.catalogue.model import Model
from imaged.engine.engine import Engine
from imaged.engine.outcome import Progress
from imaged.jobs import Job, JobReport
from imaged.worker.encode import encode_preview


@dataclass(frozen=True)
class HeldJob:
    """A claimed job. engine: what runs it; None while its checkpoint is being loaded."""

    job: Job
    model: Model  # as of the claim
    engine: Engine | None

    def snapshots(self) -> Mapping[int, bytes]:
        """Snapshots of its images under way, by sample index."""
        return self.engine.snapshots(self.job.id) if self.engine else {}

    def cancel(self) -> None:
        if self.engine:
            self.engine.cancel(self.job.id)


class HeldJobs:
    """A worker's jobs, in the order of their claims."""

    def __init__(self) -> None:
        self._jobs: dict[str, HeldJob] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[HeldJob]:
        return iter(self._jobs.values())

    def put(self, held: HeldJob) -> None:
        self._jobs[held.job.id] = held

    def get(self, job_id: str) -> HeldJob | None:
        return self._jobs.get(job_id)

    def remove(self, held: HeldJob) -> None:
        del self._jobs[held.job.id]

    def awaiting_checkpoint(self) -> list[HeldJob]:
        return [held for held in self if held.engine is None]

    def epochs(self) -> dict[str, int]:
        return {held.job.id: held.job.epoch for held in self}

    def reports(self) -> dict[str, JobReport]:
        """Progress by job, as the heartbeat reports it."""
        engines = {held.engine for held in self if held.engine}
        made = {id: p for engine in engines for id, p in engine.progress().items()}
        return {held.job.id: _report(held.job, made.get(held.job.id)) for held in self}


def _report(job: Job, made: Progress | None) -> JobReport:
    look = made.preview if made else None
    return JobReport(
        job.epoch,
        made.calls if made else 0,
        encode_preview(look.rgb, look.width, look.height) if look else None,
        look.call if look else 0,
    )
