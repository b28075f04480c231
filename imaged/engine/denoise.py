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
    owners = [n for n, run in enumerate(runs) for _ in run.keys_values]
    padding = [owners[0]] * (bucket - len(owners))
    x = torch.stack([inputs[n] for n in (*owners, *padding)])
    times = torch.cat([run.times for run in runs])
    texts = [text for run in runs for text in run.keys_values]
    if padding:
        times = torch.cat([times, times[:1].expand(len(padding), -1)])
        texts += [texts[0]] * len(padding)
    out = unet(x, times, unet.stack_texts(texts)).float()
    ends = list(accumulate(run.rows for run in runs))
    return [_guided(run, out[end - run.rows : end]) for run, end in zip(runs, ends, strict=True)]


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
