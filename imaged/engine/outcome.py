"""A job in the engine, and what the engine returns of it: progress, then its outcome."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

from imaged.engine.decode import Picture
from imaged.engine.out_of_memory import is_full
from imaged.engine.preview import Preview
from imaged.engine.run import Run
from imaged.engine.snapshot import Provenance, RunPlan, pack
from imaged.errors import ImagedError, JobFailed
from imaged.params.image_params import ImageParams

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The end of a job: all its images, or the error.

    snapshots: of a draft, the snapshot of each image; its images are then estimates.
    calls:     UNet calls made, over all images.
    """

    job_id: str
    pictures: tuple[Picture, ...]
    error: ImagedError | None
    inference_s: float
    snapshots: tuple[bytes, ...] = ()
    calls: int = 0
    provenance: Provenance | None = None


@dataclass(frozen=True)
class Progress:
    """UNet calls made and to make, over all images, and the newest preview of the first."""

    calls: int
    total: int
    preview: Preview | None


@dataclass
class EngineJob:
    """A job from submit to outcome.

    key_id:   its API key. started: monotonic seconds.
    runs:     its images under way, none before it has started.
    pictures: those of its images that are decoded, by seed.
    """

    job_id: str
    params: ImageParams
    key_id: int
    resume_plan: RunPlan
    started: float = 0.0
    runs: list[Run] = field(default_factory=list)
    pictures: dict[int, Picture] = field(default_factory=dict)

    def progress(self, preview: Preview | None) -> Progress:
        calls, total = (r.call for r in self.runs), (r.calls_to_make for r in self.runs)
        return Progress(sum(calls), sum(total), preview)

    def take(self, run: Run, picture: Picture) -> bool:
        """Take in a decoded image; True with the last one."""
        self.pictures[run.plan.seed] = picture
        if not self.resume_plan.draft:
            run.finish(run.result)
        return len(self.pictures) == len(self.runs)

    def completed(self, provenance: Provenance, seconds: float) -> Outcome:
        """The outcome with all images."""
        drafts = self.runs if self.resume_plan.draft else []
        return Outcome(
            self.job_id,
            tuple(picture for _, picture in sorted(self.pictures.items())),
            None,
            seconds,
            tuple(pack(run, provenance) for run in drafts),
            sum(run.call for run in self.runs),
            provenance,
        )


def as_failure(error: BaseException | None, device: str) -> ImagedError | None:
    """The job's failure for an exception, None for None.

    Device errors other than out of memory are raised again: the process is not usable after them.
    On a GPU every RuntimeError counts as one, because cuDNN and cuBLAS report theirs as such.
    """
    if error is None or isinstance(error, ImagedError):
        return error
    if is_full(error):
        return JobFailed("out_of_memory", "the device ran out of memory for this picture")
    of_the_device = torch.AcceleratorError if device == "cpu" else RuntimeError
    if isinstance(error, of_the_device) or not isinstance(error, Exception):
        raise error
    log.error("a picture could not be made", exc_info=error)
    return JobFailed("engine_error", "the picture could not be made; the server's log says why")
