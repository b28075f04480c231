"""What the engine returns of a job: progress while it runs, then its outcome."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from imaged.engine.decode import Picture
from imaged.engine.out_of_memory import is_full
from imaged.engine.preview import Preview
from imaged.engine.snapshot import Provenance
from imaged.errors import ImagedError, JobFailed

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
