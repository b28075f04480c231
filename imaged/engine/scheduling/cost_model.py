"""Seconds of a UNet call by its size: an exponentially weighted linear fit of measured calls."""

from __future__ import annotations

from imaged.engine.scheduling.batching import Cost

FORGET = 0.98  # weight of what was known when a call is added
FIXED = 0.2  # share of a call that is taken for fixed until calls of two sizes were seen
ALIKE = 1e-3  # of the squared mean size: with less variance no slope is fitted


class CostModel:
    """Weighted least squares over the calls so far; FORGET is the decay per call."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, work: float, seconds: float) -> None:
        """Take in one call; work: rows times pixels."""
        new = (1.0, work, seconds, work * work, work * seconds)
        old = (self._n, self._x, self._y, self._xx, self._xy)
        self._n, self._x, self._y, self._xx, self._xy = (
            FORGET * a + b for a, b in zip(old, new, strict=True)
        )

    @property
    def cost(self) -> Cost:
        """The fit. While all calls had one size, the share FIXED is assumed to be fixed cost; it is
        above batching.FIXED_SHARE, so that a second size is tried.
        """
        if not self._n:
            return Cost(0.01, 1e-8)
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x**2
        if spread <= ALIKE * mean_x**2:
            return Cost(FIXED * mean_y, (1 - FIXED) * mean_y / mean_x)
        slope = (self._xy / self._n - mean_x * mean_y) / spread
        slope = min(max(slope, 0.0), mean_y / mean_x)
        return Cost(mean_y - slope * mean_x, slope)
