"""A forecast plays through what is ahead, at the pace of what is behind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imaged.gateway.read.forecast import WIDE, device_seconds, forecast, simulate
from imaged.store.jobs.workload import Open, Pace, Past

NEEDS = st.lists(st.floats(0.1, 50), min_size=1, max_size=12)


def by_small_steps(needs: list[float], slots: int, devices: int) -> tuple[float, float]:
    """The same with a clock that ticks: the other way to find it."""
    tick, now, begins = 0.002, 0.0, 0.0
    waiting, inside = list(enumerate(needs)), dict[int, float]()
    last = len(needs) - 1
    while True:
        while waiting and len(inside) < slots:
            number, need = waiting.pop(0)
            inside[number] = need
            begins = now if number == last else begins
        share = min(1.0, devices / len(inside)) * tick
        now += tick
        inside = {n: need - share for n, need in inside.items() if need > share}
        if last not in inside and not waiting:
            return begins, now


@pytest.mark.parametrize(
    ("needs", "slots", "devices", "expected"),
    [
        ([3.0], 4, 1, (0, 3)),
        ([3.0, 3.0], 4, 1, (0, 6)),
        ([3.0, 3.0], 4, 2, (0, 3)),
        ([3.0, 1.0], 1, 1, (3, 4)),
        ([1.0, 3.0], 4, 1, (0, 4)),
        ([5.0, 5.0, 2.0], 2, 1, (10, 12)),
    ],
)
def test_what_is_ahead(
    needs: list[float], slots: int, devices: int, expected: tuple[float, float]
) -> None:
    assert simulate(needs, slots, devices) == pytest.approx(expected)


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("devices", [1, 3])
def test_it_is_what_a_clock_says(slots: int, devices: int) -> None:
    needs = [2.0, 0.7, 1.1, 3.0, 0.4, 1.9]
    assert simulate(needs, slots, devices) == pytest.approx(
        by_small_steps(needs, slots, devices), abs=0.05
    )


@given(NEEDS, st.integers(1, 5), st.integers(1, 3), st.floats(0.1, 50))
def test_more_ahead_is_never_sooner(
    needs: list[float], slots: int, devices: int, more: float
) -> None:
    begins, ends = simulate(needs, slots, devices)
    assert 0 <= begins <= ends <= sum(needs) + 1e-6
    later = simulate([more, *needs], slots, devices)
    assert later[0] >= begins - 1e-6 and later[1] >= ends - 1e-6


def test_who_shares_a_device_uses_a_part_of_it() -> None:
    past = [Past("m", 1, 0, 4), Past("m", 1, 2, 6)]
    assert device_seconds(past, 1) == [3, 3]
    assert device_seconds(past, 2) == [4, 4]


def pace(past: list[Past], ahead: list[Open], workers: int = 1) -> Pace:
    return Pace(past, ahead, workers, 0)


def test_a_forecast() -> None:
    past = [Past("m", 100, 10 * n, 10 * n + 2) for n in range(10)]
    found = forecast("m", 200, pace(past, [Open("m", 100)]), slots=1)
    assert found is not None and found.jobs == 10
    assert (found.wait.expected, found.run.expected) == pytest.approx((2, 4))
    assert (found.run.low, found.run.high) == pytest.approx((4, 4))  # they took all the same


def test_the_interval_is_what_others_differed_by() -> None:
    took = (1, *[2] * 8, 6)
    past = [Past("m", 100, 100 * n, 100 * n + seconds) for n, seconds in enumerate(took)]
    found = forecast("m", 100, pace(past, []), slots=4)
    assert found is not None
    assert (found.run.low, found.run.expected, found.run.high) == pytest.approx((2, 2, 2))
    past += [Past("m", 100, 2000 + 10 * n, 2000 + 10 * n + 6) for n in range(3)]
    wider = forecast("m", 100, pace(past, []), slots=4)
    assert wider is not None and wider.run.high == pytest.approx(6)


def test_few_jobs_tell_little() -> None:
    found = forecast("m", 100, pace([Past("m", 100, 0, 2)], []), slots=4)
    assert found is not None
    assert (found.run.low, found.run.high) == (2 * WIDE[0], 2 * WIDE[1])


def test_nothing_is_told_of_what_is_not_known() -> None:
    past = [Past("other", 100, 0, 2)]
    assert forecast("m", 100, pace(past, []), slots=4) is None
    assert forecast("other", 100, pace(past, [], workers=0), slots=4) is None
