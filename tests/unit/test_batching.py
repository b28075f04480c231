"""Who shares the next UNet call; simulated without a net."""

from dataclasses import dataclass, field
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from imaged.engine.batching import choose

clock = count()


@dataclass
class Fake:
    shape: str
    rows: int = 2
    pixels: int = 512 * 512
    served_at: int = field(default_factory=lambda: next(clock))


def test_nothing_to_do() -> None:
    assert choose([]) == []


def test_one_shape_at_a_time() -> None:
    a, b, c = Fake("a"), Fake("b"), Fake("a")
    assert choose([a, b, c]) == [a, c]


def test_cap_by_pixels_but_never_none() -> None:
    large = [Fake("a", pixels=2048 * 2048) for _ in range(3)]
    assert choose(large, pixels_a_call=2 * 2048 * 2048) == large[:1]
    assert choose(large, pixels_a_call=1) == large[:1]
    assert len(choose([Fake("a", rows=1) for _ in range(9)], pixels_a_call=4 * 512 * 512)) == 4


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_nobody_starves(shapes: list[str]) -> None:
    """However the shapes are mixed, everybody is served within as many calls as there are."""
    running = [Fake(shape) for shape in shapes]
    served: set[int] = set()
    for _ in running:
        for picture in choose(running, pixels_a_call=2 * 2 * 512 * 512):
            picture.served_at = next(clock)
            served.add(id(picture))
    assert served == {id(picture) for picture in running}
