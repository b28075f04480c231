"""In which order two sides are measured, and when a difference between them is one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import click

Better = Literal["lower", "higher"]
Measure = Callable[[int], float]  # the round's number, the same for both sides -> a figure


@dataclass(frozen=True)
class Spread:
    """The median of some figures, their quartiles and how far they reach."""

    median: float
    low: float
    high: float
    lower: float  # the quartiles: of nine figures the third from below and the third from above
    upper: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = sorted(values)
        lower, median, upper = (
            statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
        )
        return cls(median, found[0], found[-1], lower, upper)


@dataclass(frozen=True)
class Pair:
    """Both sides' figures, round by round."""

    ours: tuple[float, ...]
    peer: tuple[float, ...]

    def ratio(self, better: Better) -> Spread:
        """How many times better we are, from each round's own pair."""
        pairs = zip(self.ours, self.peer, strict=True)
        if better == "lower":
            return Spread.of(peer / ours for ours, peer in pairs)
        return Spread.of(ours / peer for ours, peer in pairs)


def order(rounds: int) -> list[str]:
    """A is ours, B the peer: AB, BA, AB, ... so that a slow drift favours neither."""
    return ["AB" if n % 2 == 0 else "BA" for n in range(rounds)]


def each_round(measure: Callable[..., float], *given: Any) -> Measure:
    """The same measurement in every round."""
    return lambda _: measure(*given)


def compare(ours: Measure, peer: Measure, rounds: int, title: str = "") -> Pair:
    """Measure both sides in turns. What has to be warm should be warm before."""
    found: dict[str, list[float]] = {"A": [], "B": []}
    for n, letters in enumerate(order(rounds)):
        for letter in letters:
            found[letter].append((ours if letter == "A" else peer)(n))
        shown = f"{found['A'][-1]:.4g} against {found['B'][-1]:.4g}"
        click.echo(f"  {title} round {n + 1} of {rounds}: {shown}", err=True)
    return Pair(tuple(found["A"]), tuple(found["B"]))


def seconds_each(make: Callable[[], object], least_s: float) -> float:
    """Seconds of one `make()`, the mean of as many as fill `least_s`; one at least."""
    started, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - started < least_s:
        make()
        count += 1
    return (time.perf_counter() - started) / count


def verdict(ratio: Spread) -> str:
    """A win or a loss only if every round says so."""
    if ratio.low > 1:
        return "win"
    return "loss" if ratio.high < 1 else "undecided"


def against_targets(ratio: Spread, target: float, quartile: float | None = None) -> str:
    """Whether the median reaches its target, and the lower quartile its own if it has one."""
    reached = "met" if ratio.median >= target else "missed"
    if quartile is None:
        return f"target {reached}"
    return f"median {reached}, quartile {'met' if ratio.lower >= quartile else 'missed'}"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed (nearest rank)."""
    ranked = sorted(values)
    rank = -(-len(ranked) * round(share * 1000) // 1000)
    return ranked[max(0, rank - 1)]
