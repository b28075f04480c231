"""Row counts that give each row the same bits, so that company does not change a picture.

With the number of rows in a call fixed, a row's result depends neither on its neighbours nor on
where it stands; with another number of rows the libraries may sum in another order. Which counts
sum alike is a fact of device, threads and shape, so it is found out here, once for each shape, by
comparing bits; where single layers are to blame, they compute two rows at a time (decision 13).
"""

from __future__ import annotations

import time
from collections.abc import Hashable

import torch

from imaged.engine.memory import is_full
from imaged.engine.nets.layers import ALONE
from imaged.engine.unet import Unet

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
            self._agree[shape, bucket] = agrees(unet, bucket, example) or (
                unet.settle(*_noises(bucket, example)) and agrees(unet, bucket, example)
            )
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
    compared = 0
    while compared < ENOUGH:
        batch = _noises(rows, example, seed=rows + compared)
        whole = unet(*batch)
        pairs = [unet(*(part[at : at + ALONE] for part in batch)) for at in range(0, rows, ALONE)]
        if not torch.equal(whole, torch.cat(pairs)):
            return False
        compared += whole.numel()
    return True


def _noises(rows: int, example: tuple[torch.Tensor, ...], seed: int = 0) -> list[torch.Tensor]:
    """(rows, ...) noise of each of the example's sizes."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = []
    for part in example:
        noise = torch.randn(rows, *part.shape, generator=generator)
        drawn.append((noise * part.float().std().cpu()).to(part.device, part.dtype))
    return drawn
