"""Bounds that are found out: they grow with what enlarges rounding, and a fault exceeds them."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import linear

from tests.tolerance import difference, in_float64, rounding, summed, with_bound


class Net(torch.nn.Module):
    """One product; called as a pipeline calls its UNet."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(64, 1024, generator=generator))

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> tuple[torch.Tensor]:
        return (scale * linear(x, self.weight),)


X, ONE = torch.randn(100, 1024, generator=torch.Generator().manual_seed(1)), torch.ones(1)


@torch.no_grad()
def test_another_order_of_a_sum_is_within_and_a_thousandth_of_a_weight_is_not() -> None:
    net = Net()
    with in_float64(net):
        [exact] = net(X.double(), scale=ONE.double())
    [found] = net(X, scale=ONE)
    assert net.weight.dtype == torch.float32 and exact.dtype == torch.float64
    backwards = linear(X.flip(1), net.weight.flip(1))
    even, odd = (linear(X[:, k::2], net.weight[:, k::2]) for k in (0, 1))
    halves = even + odd
    for other in (backwards, halves):
        for bound in (rounding(found, exact), summed(1024)):
            assert difference(other, found) <= bound
    off = net.weight.clone()
    off[0, 0] *= 1.001
    assert difference(linear(X, off), found) > max(rounding(found, exact), summed(1024))


@torch.no_grad()
def test_what_enlarges_rounding_enlarges_the_bound() -> None:
    """Guidance, here: thirty times the difference of two calls, of which each has its rounding."""
    net = Net()

    def guided(guidance: float) -> torch.Tensor:
        plain, prompted = (net(x, scale=ONE)[0] for x in (X, X + 0.1))
        mixed: torch.Tensor = plain + guidance * (prompted - plain)
        return mixed

    reach = {}
    for guidance in (2.0, 30.0):
        found, bound = with_bound(net, partial(guided, guidance))
        assert torch.equal(found, guided(guidance))  # the noise does not stay
        reach[guidance] = bound * float(found.abs().max())
        assert difference(guided(guidance * 1.01), found) > bound
    expected = (29**2 + 30**2) ** 0.5 / (1 + 2**2) ** 0.5
    assert expected / 2 < reach[30.0] / reach[2.0] < expected * 2
