"""Pictures must agree before their makers are compared."""

from __future__ import annotations

import io

import click
import numpy as np
from PIL import Image

LEVELS = 1.0  # of 255, mean over the picture: rounding and JPEG, not another picture


def difference(one: bytes, other: bytes) -> float:
    """Mean absolute difference of two encoded pictures, in levels of 255."""
    a, b = (np.asarray(Image.open(io.BytesIO(c)).convert("RGB"), float) for c in (one, other))
    if a.shape != b.shape:
        raise click.ClickException(f"pictures of different size: {a.shape} and {b.shape}")
    return float(np.abs(a - b).mean())


def agreement(ours: bytes, peer: bytes, another: bytes, most: float = LEVELS) -> dict[str, float]:
    """Ours and the peer's picture of one request, and a picture of ours with another seed.

    Raises if the two differ by more than `most` levels, or if another seed would not be told
    from them.
    """
    found = {"ours and the peer's": difference(ours, peer)}
    found["ours and another seed's"] = difference(ours, another)
    same, other = found.values()
    if same > most or other < 5 * max(same, most):
        raise click.ClickException(f"the pictures do not agree, nothing was measured: {found}")
    return found
