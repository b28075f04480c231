"""How many rows a UNet call may have: what fits into memory, and what keeps an image's bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

import torch

from imaged.engine.nets.cached_unet import Unet
from imaged.engine.nets.layers import GUIDED_ROWS
from imaged.engine.out_of_memory import is_full
from imaged.engine.scheduling.batching import MAX_PICTURES
from imaged.engine.scheduling.row_buckets import VerifiedBatchSizes, fit

PIXELS_A_CALL = 2 * 4 * 1024 * 1024  # rows times pixels: four guided pictures of 1024 x 1024
GROW_S = 60.0  # after out of memory, until the limit of pixels is doubled again


class Sized(Protocol):
    """An image, as far as the size of its calls depends on it."""

    @property
    def kind(self) -> Hashable: ...  # what batch sizes are verified for, see Run.kind
    @property
    def rows(self) -> int: ...  # one, or two with guidance
    @property
    def pixels(self) -> int: ...
    @property
    def example(self) -> tuple[torch.Tensor, ...]: ...  # of its rows, see VerifiedBatchSizes.allow


S = TypeVar("S", bound=Sized)


class CallBudget:
    """The largest call: so many rows times pixels, and if `exact` a verified batch size.

    grow_at: monotonic seconds, when the limit of pixels is doubled; infinite while nothing has been
    out of memory.
    """

    def __init__(self, pixels_a_call: int, *, exact: bool) -> None:
        self.exact = exact
        self.pixels_a_call = self.most_pixels = pixels_a_call
        self.grow_at = math.inf
        self.batch_sizes = VerifiedBatchSizes()

    def renew(self, now: float) -> None:
        """Before each choice: one trial of a batch size is allowed, and the limit of pixels is
        doubled if GROW_S have passed.
        """
        self.batch_sizes.tried = False
        if now > self.grow_at:
            self.pixels_a_call = min(2 * self.pixels_a_call, self.most_pixels)
            self.grow_at = math.inf if self.pixels_a_call == self.most_pixels else now + GROW_S

    def halve(self, rows: int, pixels: int, now: float) -> None:
        """A call of so many rows was out of memory: half of it is the limit for GROW_S."""
        self.pixels_a_call = self.padded(rows) * pixels // 2
        self.grow_at = now + GROW_S

    def padded(self, rows: int) -> int:
        """Batch size after padding."""
        return fit(rows) if self.exact else rows

    def allows(self, unet_of: Callable[[S], Unet], image: S, rows: int) -> bool:
        """Whether a batch of this image's shape may have so many rows.

        unet_of: gives the UNet that makes the image, with its LoRAs in use; asked in the exact
        class alone. If there is no memory for it the image goes alone, and its own call says so.
        """
        if (
            rows > GUIDED_ROWS * MAX_PICTURES
            or self.padded(rows) * image.pixels > self.pixels_a_call
        ):
            return False
        if not self.exact:
            return True
        try:
            unet = unet_of(image)
        except (RuntimeError, MemoryError) as error:
            if not is_full(error):
                raise
            return False
        guided = image.rows == GUIDED_ROWS and rows % GUIDED_ROWS == 0  # every image of the batch
        return self.batch_sizes.allow(unet, image.kind, rows, image.example, guided)
