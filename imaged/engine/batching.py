"""Which pictures share the next UNet call. Pure: looks at a list, returns a list."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar


class Waiting(Protocol):
    """What the choice depends on."""

    @property
    def shape(self) -> Hashable: ...  # latent shape and context length
    @property
    def rows(self) -> int: ...  # one, or two with guidance
    @property
    def served_at(self) -> int: ...  # the tick of its last call; unique order of arrival before
    @property
    def pixels(self) -> int: ...


W = TypeVar("W", bound=Waiting)

PIXELS_A_CALL = 2 * 4 * 1024 * 1024  # rows times pixels: four guided pictures of 1024 x 1024


def choose(running: Sequence[W], pixels_a_call: int = PIXELS_A_CALL) -> list[W]:
    """The pictures of one shape whose turn it is, longest unserved first, as many as fit.

    The group of the picture that has waited longest goes next, so no shape starves another.
    At least one picture is chosen, however large.
    """
    groups: dict[Hashable, list[W]] = defaultdict(list)
    for picture in sorted(running, key=lambda p: p.served_at):
        groups[picture.shape].append(picture)
    if not groups:
        return []
    group = next(iter(groups.values()))  # holds the longest unserved
    chosen, used = [group[0]], group[0].rows * group[0].pixels
    for picture in group[1:]:
        used += picture.rows * picture.pixels
        if used > pixels_a_call:
            break
        chosen.append(picture)
    return chosen
