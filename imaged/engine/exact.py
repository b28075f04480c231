"""Row counts that give each row the same bits, so that company does not change a picture.

With the number of rows in a call fixed, a row's result depends neither on its neighbours nor on
where it stands; with another number of rows the libraries may sum in another order. Which counts
sum alike is a fact of device, threads and shape, so it is found out here, once for each shape, by
comparing bits (decision 13).
"""

from __future__ import annotations

import time
from collections.abc import Hashable

import torch

from imaged.engine.memory import is_full
from imaged.engine.unet import Unet

ALONE = 2  # rows of a guided picture alone; every other count has to agree with it
BUCKETS = (2, 4, 8, 16)
AGAIN_S = 60.0  # after a trial for which there was no memory, from when on there may be
ENOUGH = 10_000  # values that have to be equal: a few could agree by luck


class Buckets:
    """Which row counts exact pictures may share."""

    def __init__(self) -> None:
        self._agree: dict[tuple[Hashable, int], bool] = {}
        self._full: dict[tuple[Hashable, int], float] = {}  # when there was no memory for a trial
        self.tried = False  # one trial is enough between two calls: it takes several

    def allow(
        self, unet: Unet, shape: Hashable, rows: int, example: tuple[torch.Tensor, ...]
    ) -> bool:
        """Whether a call of so many rows, padded to its bucket, changes nothing. Not before it
        was tried, which is done once while `tried` is false.

        `example`: x (C, h, w), times (E,) and texts (T,) of one row of this shape.
        """
        bucket = fit(rows)
        if bucket > ALONE and (shape, bucket) not in self._agree and not self.tried:
            self._try(unet, shape, bucket, example)
        return bucket == ALONE or self._agree.get((shape, bucket), False)

    def _try(
        self, unet: Unet, shape: Hashable, bucket: int, example: tuple[torch.Tensor, ...]
    ) -> None:
        now = time.monotonic()
        if now < self._full.get((shape, bucket), -AGAIN_S) + AGAIN_S:
            return
        self.tried = True
        try:
            self._agree[shape, bucket] = agrees(unet, bucket, example)
        except (RuntimeError, MemoryError) as error:
            if not is_full(error):
                raise
            self._full[shape, bucket] = now


def fit(rows: int) -> int:
    """The bucket that a call of so many rows is padded to."""
    return next(bucket for bucket in BUCKETS if bucket >= rows)


@torch.inference_mode()
def agrees(unet: Unet, rows: int, example: tuple[torch.Tensor, ...]) -> bool:
    """Whether a call of `rows` rows gives the bits of calls of two, on noise like the example."""
    generator = torch.Generator("cpu").manual_seed(rows)
    compared = 0
    while compared < ENOUGH:
        batch = [_noise_like(part, rows, generator) for part in example]
        whole = unet(*batch)
        pairs = [unet(*(part[at : at + ALONE] for part in batch)) for at in range(0, rows, ALONE)]
        if not torch.equal(whole, torch.cat(pairs)):
            return False
        compared += whole.numel()
    return True


def _noise_like(part: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    """(rows, ...) noise of the example's size."""
    noise = torch.randn(rows, *part.shape, generator=generator)
    return (noise * part.float().std().cpu()).to(part.device, part.dtype)
