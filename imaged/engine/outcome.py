"""How far a job is, and how it ended."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from imaged.engine.decode import Picture
from imaged.engine.memory import is_full
from imaged.engine.preview import Preview
from imaged.engine.state import Maker
from imaged.errors import ImagedError, JobFailed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a job ended: all its pictures, or why there are none.

    `states`: of a draft, what each picture goes on from; its pictures are then estimates.
    `calls`: UNet calls that lie behind the pictures, over all of them.
    """

    job_id: str
    pictures: tuple[Picture, ...]
    error: ImagedError | None
    inference_s: float
    states: tuple[bytes, ...] = ()
    calls: int = 0
    maker: Maker | None = None


@dataclass(frozen=True)
class Progress:
    """UNet calls made and to make over all pictures, and a look at the first one."""

    calls: int
    total: int
    preview: Preview | None


def as_failure(error: BaseException | None, device: str) -> ImagedError | None:
    """An error of one job; a device error other than out of memory is not ours to survive.

    The libraries of a GPU (cuDNN, cuBLAS) report its errors as plain RuntimeErrors.
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
