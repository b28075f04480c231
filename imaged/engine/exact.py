"""Row counts that give each row the same bits, so that company does not change a picture.

With the number of rows in a call fixed, a row's result does not depend on its neighbours; with
another number of rows the libraries may sum in another order. Which counts sum alike is a fact of
device, threads and shape, so it is found out here, once for each shape, by comparing bits; where
single layers are to blame, they compute two rows at a time (decision 13).

What is compared are calls of many rows with calls of two, so every place of a call is known to have
the bits of its place in a pair, the first or the second. A guided picture's two rows stand on a
first and a second place alone, and beside others like it: more need not be known. A picture of one
row stands alone on a first place, in company perhaps on a second, and moves those behind it by one.
Such pictures share calls only where a pair whose rows change places gives the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from weakref import WeakKeyDictionary

import torch

from imaged.engine.memory import is_full
from imaged.engine.nets.layers import ALONE
from imaged.engine.unet import Unet

BUCKETS = (2, 4, 8, 16)
AGAIN_S = 60.0  # after a trial for which there was no memory or time, from when on there may be
SELDOM = 100  # and not before so many times of what it took: it holds up every picture
ENOUGH = 10_000  # values that have to be equal: a few could agree by luck
#: So many times as many in bfloat16 and float16: their rounding hides what a sum in another order
#: changes, but for one value in 15,000 to 50,000 (of float32's every second or fourth shows it).
ROUNDED = 32
#: Seconds. The loop stands still for a trial; one that would take longer is not made, and pictures
#: of its shape go alone: where a call takes seconds, sharing it gains little.
LONGEST_S, SOON_S = 30.0, 1.0


class Buckets:
    """Which row counts exact pictures may share."""

    def __init__(self) -> None:
        #: By shape and rows; under ALONE whether the two places of a pair do.
        self._agree: WeakKeyDictionary[Unet, dict[tuple[Hashable, int], bool]]
        self._agree = WeakKeyDictionary()
        #: From when on a trial for which there was no memory or no time may be made again.
        self._put_off: dict[tuple[Hashable, int], float] = {}
        self.tried = False  # one trial is enough between two calls: it takes several

    def allow(
        self,
        unet: Unet,
        shape: Hashable,
        rows: int,
        example: tuple[torch.Tensor, ...],
        paired: bool = True,
    ) -> bool:
        """Whether a call of so many rows, padded to its bucket, changes nothing. Not before it
        was tried, which is done once while `tried` is false.

        `example`: x (C, h, w), times (E,) and texts (T,) of one row of this shape. `paired`: every
        picture has two rows, and so has its places.
        """
        bucket = fit(rows)
        needed = ([] if paired else [ALONE]) + ([bucket] if bucket > ALONE else [])
        return all(self._agrees(unet, shape, count, example) for count in needed)

    def _agrees(
        self, unet: Unet, shape: Hashable, bucket: int, example: tuple[torch.Tensor, ...]
    ) -> bool:
        found = self._agree.setdefault(unet, {})
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
            if found is False and unet.settle(*_noises(bucket, example)):
                found = agrees(unet, bucket, example)
            if found is None:
                self._put_off[shape, bucket] = _later(now)
            else:
                self._agree[unet][shape, bucket] = found
        except (RuntimeError, MemoryError) as error:
            if not is_full(error):
                raise
            self._put_off[shape, bucket] = _later(now)


def _later(began: float) -> float:
    """From when on a trial in vain, which began then and ends now, may be made again."""
    now = time.monotonic()
    return now + max(AGAIN_S, SELDOM * (now - began))


def fit(rows: int) -> int:
    """The bucket that a call of so many rows is padded to."""
    return next(bucket for bucket in BUCKETS if bucket >= rows)


@torch.inference_mode()
def agrees(unet: Unet, rows: int, example: tuple[torch.Tensor, ...]) -> bool | None:
    """Whether a call of `rows` rows gives the bits of calls of two, and one of two rows the bits of
    itself with its rows exchanged, on noise like the example. None if that takes too long to say.
    """
    enough = ENOUGH * (1 if unet.dtype == torch.float32 else ROUNDED)
    batches = -(-enough // (rows * example[0].numel()))
    began = time.monotonic()
    for n in range(batches):
        batch, pairs = _noises(rows, example, seed=rows + n), list[torch.Tensor]()
        for at in range(0, rows, ALONE):
            pair = [part[at : at + ALONE] for part in batch]
            pairs.append(unet(*pair))
            behind = n + (at + ALONE) / (2 * rows)  # batches; the whole takes as long as its pairs
            if _too_long(time.monotonic() - began, behind / batches):
                return None
        whole = unet(*(part.flip(0) for part in batch)).flip(0) if rows == ALONE else unet(*batch)
        if not torch.equal(whole, torch.cat(pairs)):
            return False
    return True


def _too_long(seconds: float, share: float) -> bool:
    """Whether a trial will be, of which this share took so long."""
    return seconds > SOON_S and seconds / share > LONGEST_S


def _noises(rows: int, example: tuple[torch.Tensor, ...], seed: int = 0) -> list[torch.Tensor]:
    """(rows, ...) noise of each of the example's sizes."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = []
    for part in example:
        noise = torch.randn(rows, *part.shape, generator=generator)
        drawn.append((noise * part.float().std().cpu()).to(part.device, part.dtype))
    return drawn
