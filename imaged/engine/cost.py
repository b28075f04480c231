"""What UNet calls take here: a line through the calls so far, the latest counting most."""

from __future__ import annotations

from imaged.engine.batching import Cost

FORGET = 0.98  # weight of what was known when a call is added


class Meter:
    """Fits Cost to calls as they are made."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, work: float, seconds: float) -> None:
        """One call of `work` rows times pixels."""
        new = (1.0, work, seconds, work * work, work * seconds)
        old = (self._n, self._x, self._y, self._xx, self._xy)
        self._n, self._x, self._y, self._xx, self._xy = (
            FORGET * a + b for a, b in zip(old, new, strict=True)
        )

    @property
    def cost(self) -> Cost:
        """The fit; while all calls were alike, a tenth of them is taken for fixed."""
        if not self._n:
            return Cost(0.01, 1e-8)
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x**2
        if spread <= 1e-6 * mean_x**2:
            return Cost(0.1 * mean_y, 0.9 * mean_y / mean_x)
        slope = (self._xy / self._n - mean_x * mean_y) / spread
        slope = min(max(slope, 0.0), mean_y / mean_x)
        return Cost(mean_y - slope * mean_x, slope)
