"""Batch invariance: batch sizes that were verified to give bitwise equal rows (decision 13).

With the batch size fixed, a row's result does not depend on its neighbours; with another size the
libraries may sum in another order. Which sizes agree depends on device, threads and shape, so it is
tried here once for each shape, by comparing bits; where single layers differ, they compute two rows
at a time.

Each row of a batch has to equal the same row in a call of two. A guided image's two rows keep their
places in a pair, so for these that is enough. An image of one row may stand second in a batch, and
shifts those behind it: such images share calls only where a pair with its rows exchanged gives the
same bits.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from weakref import WeakKeyDictionary

import torch

from imaged.engine.nets.cached_unet import Unet
from imaged.engine.nets.layers import GUIDED_ROWS
from imaged.engine.out_of_memory import is_full

BATCH_SIZES = (2, 4, 8, 16)
RETRY_TRIAL_S = 60.0  # least seconds until a trial that had no memory or time is repeated
RETRY_TRIAL_RATIO = 100  # and at least so many times its duration: it delays every image
MIN_VALUES = 10_000  # values compared: a few could be equal by chance
#: Times as many in bfloat16 and float16: their rounding hides another order of summation in all but
#: one value in 15,000 to 50,000 (in float32 every second to fourth value shows it).
HALF_PRECISION_FACTOR = 32
#: Seconds. The loop waits for a trial. One that would take longer than MAX_TRIAL_S, judged after
#: JUDGE_AFTER_S, is given up and images of its shape run alone: sharing gains little where calls
#: are slow.
MAX_TRIAL_S, JUDGE_AFTER_S = 30.0, 1.0


class VerifiedBatchSizes:
    """Batch sizes that exact images may share, by shape."""

    def __init__(self) -> None:
        #: By shape and rows; under GUIDED_ROWS: whether the two places of a pair agree.
        self.agree: WeakKeyDictionary[Unet, dict[tuple[Hashable, int], bool]]
        self.agree = WeakKeyDictionary()
        #: When a trial that had no memory or time may be repeated (monotonic seconds).
        self._put_off: dict[tuple[Hashable, int], float] = {}
        self.tried = False  # at most one trial between two calls

    def allow(
        self,
        unet: Unet,
        shape: Hashable,
        rows: int,
        example: tuple[torch.Tensor, ...],
        paired: bool = True,
    ) -> bool:
        """Whether a batch of so many rows, padded, has the bits of each image alone. Tries it if
        nobody has, unless `tried` is set: then False for now.

        example: x (C, h, w), times (E,) and texts (T,) of one row of this shape.
        paired:  every image of the batch has two rows.
        """
        bucket = fit(rows)
        needed = ([] if paired else [GUIDED_ROWS]) + ([bucket] if bucket > GUIDED_ROWS else [])
        return all(self._agrees(unet, shape, count, example) for count in needed)

    def _agrees(
        self, unet: Unet, shape: Hashable, bucket: int, example: tuple[torch.Tensor, ...]
    ) -> bool:
        found = self.agree.setdefault(unet, {})
        if (shape, bucket) not in found and not self.tried:
            self._try(unet, shape, bucket, example)
        return found.get((shape, bucket), False)

    def _try(
        self, unet: Unet, shape: Hashable, bucket: int, example: tuple[torch.Tensor, ...]
    ) -> None:
        now = time.monotonic()
        if now < self._put_off.get((shape, bucket), now):
            return
        self.tried = True
        try:
            found = agrees(unet, bucket, example)
            if found is False and unet.enable_paired_rows(*_noises(bucket, example)):
                found = agrees(unet, bucket, example)
            if found is None:
                self._put_off[shape, bucket] = _later(now)
            else:
                self.agree[unet][shape, bucket] = found
        except (RuntimeError, MemoryError) as error:
            if not is_full(error):
                raise
            self._put_off[shape, bucket] = _later(now)


def _later(began: float) -> float:
    """When a trial that began then and failed now may be repeated."""
    now = time.monotonic()
    return now + max(RETRY_TRIAL_S, RETRY_TRIAL_RATIO * (now - began))


def fit(rows: int) -> int:
    """Batch size after padding: the smallest that holds so many rows, 16 at most."""
    return next(bucket for bucket in BATCH_SIZES if bucket >= rows)


@torch.inference_mode()
def agrees(unet: Unet, rows: int, example: tuple[torch.Tensor, ...]) -> bool | None:
    """Whether a batch of `rows` has the bits of calls of two rows, and a batch of two those of
    itself with its rows exchanged, on noise like the example; None if it takes too long.
    """
    enough = MIN_VALUES * (1 if unet.dtype == torch.float32 else HALF_PRECISION_FACTOR)
    batches = -(-enough // (rows * example[0].numel()))
    began = time.monotonic()
    for n in range(batches):
        batch, pairs = _noises(rows, example, seed=rows + n), list[torch.Tensor]()
        for at in range(0, rows, GUIDED_ROWS):
            pair = [part[at : at + GUIDED_ROWS] for part in batch]
            pairs.append(unet(*pair))
            done = n + (at + GUIDED_ROWS) / (2 * rows)  # the whole takes as long as its pairs
            if _too_long(time.monotonic() - began, done / batches):
                return None
        if rows == GUIDED_ROWS:
            whole = unet(*(part.flip(0) for part in batch)).flip(0)
        else:
            whole = unet(*batch)
        if not torch.equal(whole, torch.cat(pairs)):
            return False
    return True


def _too_long(seconds: float, share: float) -> bool:
    """Whether the whole will take too long, if this share of it took so many seconds."""
    return seconds > JUDGE_AFTER_S and seconds / share > MAX_TRIAL_S


def _noises(rows: int, example: tuple[torch.Tensor, ...], seed: int = 0) -> list[torch.Tensor]:
    """(rows, ...) noise with shape and scale of each part of the example."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = []
    for part in example:
        noise = torch.randn(rows, *part.shape, generator=generator)
        drawn.append((noise * part.float().std().cpu()).to(part.device, part.dtype))
    return drawn
