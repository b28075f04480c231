"""How far apart two right computations may be, found out beside them and not written down.

Float32 sums come out otherwise in another order, and the order is a matter of processor, threads
and memory layout. What a net's call is off by is measured: against the same net in float64. What
becomes of that over a picture's calls (guidance 15 enlarges it thirty times as much as guidance 7,
some samplers a hundred times as much as others) is measured too: the reference runs again with
noise of that size on every output of its UNet. A literal would be one machine's luck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Ours and the reference are each as far from the exact result; their largest differences are two
#: draws from one distribution, on either side of it: one and a half times, where luck is bad three.
MARGIN = 4.0
#: Of a picture's latents, which may move along few directions: one draw may happen to be small.
DRAWS, DRAWN_MARGIN = 3, 3.0
LEAST = 2.0**-22  # where the reference is exact: two roundings of float32


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest, relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def summed(products: int) -> float:
    """For one sum of so many products, relative to the largest result: roundings of half a unit add
    up like a random walk, and the largest of many thousand walks goes four deviations far.
    """
    return float(MARGIN * max(LEAST, 2.0**-24 * products**0.5))


@contextmanager
def in_float64(*nets: torch.nn.Module) -> Iterator[None]:
    """The same weights: float32 numbers are float64 numbers, there and back."""
    _turn(nets, torch.float64)
    try:
        yield
    finally:
        _turn(nets, torch.float32)


@torch.inference_mode(False)  # else nobody could use them outside of it any more
@torch.no_grad()
def _turn(nets: tuple[torch.nn.Module, ...], dtype: torch.dtype) -> None:
    for net in nets:
        net.to(dtype)


def rounding(theirs: torch.Tensor, exact: torch.Tensor) -> float:
    """How far from `theirs` ours may be, from what theirs is off by itself."""
    return max(LEAST, MARGIN * difference(theirs.double(), exact))


def with_bound(unet: Any, latents: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The reference's latents, and how far from them ours may be.

    The noise on an output of the UNet is even, and as large as what its first call is off by at
    most: five times what calls are off by in the mean.
    """
    found, moved, sizes = latents(), list[float](), list[float]()
    for seed in range(DRAWS):
        hook = unet.register_forward_hook(_noise(seed, sizes), with_kwargs=True)
        try:
            moved.append(difference(latents(), found))
        finally:
            hook.remove()
    return found, max(LEAST, DRAWN_MARGIN * max(moved))


def _noise(seed: int, sizes: list[float]) -> Callable[..., tuple[torch.Tensor]]:
    """A hook; `sizes` is empty before the first call of all."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(unet: Any, args: Any, kwargs: Any, out: tuple[torch.Tensor]) -> Any:
        if not sizes:
            with in_float64(unet):
                [exact] = unet.forward(*_wide(args), **_wide(kwargs))
            sizes.append(difference(out[0].double(), exact) * float(out[0].abs().max()))
        even = 2 * torch.rand(out[0].shape, generator=generator) - 1
        return (out[0] + sizes[0] * even,)

    return disturb


def _wide(given: Any) -> Any:
    """All numbers in it in float64."""
    if isinstance(given, dict):
        return {name: _wide(value) for name, value in given.items()}
    if isinstance(given, tuple):
        return tuple(_wide(value) for value in given)
    floats = isinstance(given, torch.Tensor) and given.is_floating_point()
    return given.double() if floats else given
