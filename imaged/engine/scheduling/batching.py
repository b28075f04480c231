"""Which images share the next UNet call: pure functions of what runs.

Order: least work left first (SRPT), with ageing against starvation, plus what the image's key has
used of the device beyond others (fair queueing). Images of the first one's shape join its call as
long as a larger batch makes a row cheaper by the measured cost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """An image, as far as the choice depends on it."""

    @property
    def shape(self) -> Hashable: ...  # equal for all images of a call, see Run.shape
    @property
    def rows(self) -> int: ...  # one, or two with guidance
    @property
    def pixels(self) -> int: ...
    @property
    def calls_left(self) -> int: ...
    @property
    def key_id(self) -> int: ...  # whose it is
    @property
    def arrived(self) -> float: ...  # seconds on the clock of `now`
    @property
    def served_s(self) -> float: ...  # seconds of its calls so far


W = TypeVar("W", bound=Candidate)

AGEING = 0.05  # seconds of work that a second of waiting makes up for
MAX_PICTURES = 8  # in a call, however small they are
FIXED_SHARE = 0.1  # calls grow until their fixed part is below this share
SLOWED = 1.25  # while few pictures run, a newcomer may make a call so much longer
FEW = 2


@dataclass(frozen=True)
class Cost:
    """Predicted seconds of a UNet call: fixed_s + pixel_s * rows * pixels."""

    fixed_s: float
    pixel_s: float

    def call_s(self, work: float) -> float:
        """work: rows times pixels."""
        return self.fixed_s + self.pixel_s * work


def order(running: Sequence[W], cost: Cost, used_s: Mapping[int, float], now: float) -> list[W]:
    """The images in order of priority, the next one first."""
    least = min((used_s.get(p.key_id, 0.0) for p in running), default=0.0)

    def place(picture: W) -> float:
        left_s = picture.calls_left * cost.call_s(picture.rows * picture.pixels)
        waited_s = max(0.0, now - picture.arrived - picture.served_s)
        return left_s - AGEING * waited_s + used_s.get(picture.key_id, 0.0) - least

    return sorted(running, key=place)


def choose(
    running: Sequence[W],
    cost: Cost,
    used_s: Mapping[int, float],
    now: float,
    fits: Callable[[W, int], bool],
    padded: Callable[[int], int] = int,
) -> list[W]:
    """The first in order, and those behind it that join its call.

    fits(image, rows): whether a batch of the image's shape may have so many rows.
    padded(rows):      the batch size after padding.
    While at most FEW images run, one joins only if the call then takes at most SLOWED times as
    long: on a device that one image keeps busy, it is no worse to run them in turn.
    """
    if not running:
        return []
    first, *others = order(running, cost, used_s, now)
    chosen, rows = [first], first.rows
    for picture in (p for p in others if p.shape == first.shape):
        if len(chosen) == MAX_PICTURES:
            break
        more = rows + picture.rows
        work, longer = padded(rows) * first.pixels, padded(more) * first.pixels
        if longer > work and not _pays(cost, work, longer, len(running)):
            break
        if not fits(first, more):  # last: it may have to try the device
            break
        chosen.append(picture)
        rows = more
    return _fullest(chosen, cost, padded)


def _pays(cost: Cost, work: float, longer: float, running: int) -> bool:
    """Whether one more image makes a row cheaper."""
    call_s = cost.call_s(work)
    if running <= FEW and cost.call_s(longer) > SLOWED * call_s:
        return False
    return cost.fixed_s > FIXED_SHARE * call_s


def _fullest(chosen: list[W], cost: Cost, padded: Callable[[int], int]) -> list[W]:
    """The prefix with the least seconds per row, the longest on a tie: padding may cost more than a
    later call.
    """
    counts = list(accumulate(p.rows for p in chosen))
    row_s = [cost.call_s(padded(rows) * chosen[0].pixels) / rows for rows in counts]
    return chosen[: max(n + 1 for n, seconds in enumerate(row_s) if seconds == min(row_s))]


def joined(used_s: Mapping[int, float], present: Collection[int], key_id: int) -> dict[int, float]:
    """Device seconds by key after `key_id` has joined those `present`.

    Fair queueing: idle time earns no credit; a debt persists while other keys have jobs.
    """
    least = min((used_s[k] for k in present if k in used_s), default=0.0)
    kept = {k: s for k, s in used_s.items() if present and (k in present or s > least)}
    return {**kept, key_id: max(kept.get(key_id, 0.0), least)}
