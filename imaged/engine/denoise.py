"""One UNet call for any mix of pictures of one shape; guidance per picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from imaged.engine.nets.cached_unet import Unet
from imaged.engine.run import Run


@torch.inference_mode()
def denoise(unet: Unet, runs: Sequence[Run], bucket: int) -> list[torch.Tensor]:
    """The guided model output (C, h, w) of each picture, float32, from one call.

    The batch is padded to `bucket` rows with copies of the first; their results are dropped.
    """
    inputs = [run.combine() for run in runs]
    rows = [run.rows for run in runs]
    owners = [n for n, own in enumerate(rows) for _ in range(own)]
    padding = [owners[0]] * (bucket - len(owners))
    x = torch.stack([inputs[n] for n in (*owners, *padding)])
    conditioning = [run.row_conditioning for run in runs]
    times = torch.cat([own for own, _ in conditioning])
    texts = [text for _, own in conditioning for text in own]
    if padding:
        times = torch.cat([times, times[:1].expand(len(padding), -1)])
        texts += [texts[0]] * len(padding)
    out = unet(x, times, unet.stack_texts(texts)).float()
    split = zip(runs, rows, accumulate(rows), strict=True)
    return [_guided(run, out[end - own : end]) for run, own, end in split]


def _guided(run: Run, rows: torch.Tensor) -> torch.Tensor:
    """rows: (2, C, h, w), without and with the prompt, or the prompted one alone.

    Classifier-free guidance, then `guidance_rescale` from 0 (none) to 1 (to the standard deviation
    of the prompted output): Lin et al. 2024, equations 14 to 16.
    """
    if len(rows) == 1:
        return rows[0]
    plan = run.plan
    out = rows[0] + plan.guidance * (rows[1] - rows[0])
    if plan.rescale:
        out = out * (plan.rescale * rows[1].std() / out.std() + 1 - plan.rescale)
    return out
