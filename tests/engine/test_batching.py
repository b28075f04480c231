"""Who shares the next UNet call; simulated without a net."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imaged.engine.scheduling import batching
from imaged.engine.scheduling.batching import MAX_PICTURES, Cost, choose, order
from imaged.engine.scheduling.cost_model import CostModel
from imaged.engine.scheduling.row_buckets import fit

# SMALL and LARGE are chosen for the tests, not measured: with SMALL one guided picture of 512 x 512
# takes a call of 27 ms, and each further one 17 ms.
CROWD = 2 * 512 * 512
SMALL = Cost(0.010, 0.017 / CROWD)
LARGE = Cost(0.010, 0.170 / CROWD)  # the fixed part is nothing: calls are what they compute
# Lines through calls of 2, 4, 8 and 16 rows of 512 x 512, measured on two cores (Xeon, 2.8 GHz).
MEASURED = {
    "thin": Cost(0.026, 0.0049 / CROWD),
    "micro": Cost(0.038, 0.058 / CROWD),
    "wide": Cost(0.063, 0.132 / CROWD),
}


@dataclass(eq=False)
class Fake:
    shape: str = "a"
    rows: int = 2
    pixels: int = 512 * 512
    calls_left: int = 20
    key_id: int = 0
    arrived: float = 0.0
    served_s: float = 0.0
    ended: float = 0.0


def anything(picture: Fake, rows: int) -> bool:
    return True


def test_nothing_to_do() -> None:
    assert choose([], SMALL, {}, 0.0, anything) == []


def test_one_shape_at_a_time_the_shortest_first() -> None:
    a, b, c = Fake("a", calls_left=9), Fake("b", calls_left=5), Fake("a", calls_left=3)
    assert choose([a, b, c], SMALL, {}, 0.0, anything) == [c, a]


def test_as_many_as_fit_and_pay() -> None:
    crowd = [Fake() for _ in range(12)]
    assert len(choose(crowd, Cost(1.0, 0.0), {}, 0.0, anything)) == MAX_PICTURES
    assert len(choose(crowd, SMALL, {}, 0.0, anything)) == 6  # 10 of 112 ms are fixed
    assert len(choose(crowd, LARGE, {}, 0.0, anything)) == 1
    assert len(choose(crowd, SMALL, {}, 0.0, lambda _, rows: rows <= 4)) == 2
    assert len(choose(crowd, SMALL, {}, 0.0, lambda _, rows: False)) == 1


def test_padding_is_not_paid_for_but_filled() -> None:
    def sizes(pictures: int, cost: Cost) -> int:
        crowd = [Fake() for _ in range(pictures)]
        return len(choose(crowd, cost, {}, 0.0, anything, fit))

    assert [sizes(n, SMALL) for n in (2, 3, 4, 5, 8)] == [1, 2, 4, 4, 8]
    overhead = Cost(0.010, 0.0001 / CROWD)
    assert [sizes(n, overhead) for n in (2, 3, 5, 8, 12)] == [2, 3, 5, 8, MAX_PICTURES]
    plain = [Fake(rows=1), Fake(rows=1)]  # the second takes the place of padding
    assert len(choose(plain, LARGE, {}, 0.0, anything, fit)) == 2
    assert len(choose(plain, LARGE, {}, 0.0, anything)) == 1


def test_an_equal_newcomer_does_not_slow_a_running_picture() -> None:
    running, newcomer = Fake(calls_left=10), Fake(calls_left=20)
    assert choose([newcomer, running], SMALL, {}, 0.0, anything) == [running]
    overhead = Cost(0.010, 0.001 / CROWD)  # where it costs next to nothing, it may join
    assert choose([newcomer, running], overhead, {}, 0.0, anything) == [running, newcomer]


def test_waiting_makes_up_for_length() -> None:
    long, short = Fake(calls_left=100), Fake(calls_left=10, arrived=50.0)
    assert order([long, short], SMALL, {}, 40.0) == [short, long]
    assert order([long, short], SMALL, {}, 60.0) == [long, short]


def test_keys_that_used_more_stand_behind() -> None:
    greedy, modest = Fake(key_id=1, calls_left=10), Fake(key_id=2, calls_left=60)
    assert order([greedy, modest], SMALL, {1: 1.0, 2: 1.0}, 0.0) == [greedy, modest]
    assert order([greedy, modest], SMALL, {1: 9.0, 2: 1.0}, 0.0) == [modest, greedy]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 100)), min_size=1, max_size=12))
def test_the_choice_is_of_one_shape_and_without_doubles(crowd: list[tuple[str, int]]) -> None:
    running = [Fake(shape, calls_left=left) for shape, left in crowd]
    chosen = choose(running, SMALL, {}, 1.0, anything)
    assert 1 <= len(chosen) <= MAX_PICTURES
    assert len({p.shape for p in chosen}) == 1 and len(set(map(id, chosen))) == len(chosen)
    assert chosen[0] is order(running, SMALL, {}, 1.0)[0]


Policy = Callable[[Sequence[Fake], float], list[Fake]]


def call_s_of(chosen: Sequence[Fake], cost: Cost, padded: Callable[[int], int]) -> float:
    return cost.call_s(padded(sum(p.rows for p in chosen)) * chosen[0].pixels)


def ours(cost: Cost, padded: Callable[[int], int] = int) -> Policy:
    used: dict[int, float] = {}

    def policy(running: Sequence[Fake], now: float) -> list[Fake]:
        chosen = choose(running, cost, used, now, anything, padded)
        call_s = call_s_of(chosen, cost, padded)
        for p in chosen:
            used[p.key_id] = used.get(p.key_id, 0.0) + call_s / len(chosen)
        return chosen

    return policy


def first_come(running: Sequence[Fake], now: float) -> list[Fake]:
    return [min(running, key=lambda p: p.arrived)]


def simulate(
    jobs: list[Fake], cost: Cost, policy: Policy, padded: Callable[[int], int] = int
) -> None:
    """Serve until all have ended; each notes when."""
    coming, now = sorted(jobs, key=lambda p: p.arrived), 0.0
    running: list[Fake] = []
    while coming or running:
        if not running:
            now = max(now, coming[0].arrived)
        while coming and coming[0].arrived <= now:
            running.append(coming.pop(0))
        chosen = policy(running, now)
        call_s = call_s_of(chosen, cost, padded)
        now += call_s
        for picture in chosen:
            picture.calls_left -= 1
            picture.served_s += call_s
            picture.ended = now
        running = [p for p in running if p.calls_left]


def mix(cost: Cost, load: float, count: int = 2000) -> list[Fake]:
    """Poisson arrivals of 10, 20, 30 and 50 calls at a share of what one at a time can do."""
    rng, now, jobs = random.Random(1), 0.0, []
    mean_s = 27.5 * cost.call_s(CROWD)
    for _ in range(count):
        now += rng.expovariate(load / mean_s)
        jobs.append(Fake(calls_left=rng.choice((10, 20, 30, 50)), arrived=now))
    return jobs


def times(
    cost: Cost, load: float, policy: Policy, padded: Callable[[int], int] = int
) -> tuple[list[float], list[float]]:
    """Seconds from arrival to end of the shortest jobs and of the longest."""
    jobs = mix(cost, load)
    short = [p for p in jobs if p.calls_left == 10]
    long = [p for p in jobs if p.calls_left == 50]
    simulate(jobs, cost, policy, padded)
    return [p.ended - p.arrived for p in short], [p.ended - p.arrived for p in long]


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


@pytest.mark.parametrize(("cost", "lower"), [(SMALL, 4), (LARGE, 6)], ids=["small", "large"])
def test_short_jobs_are_short_and_long_ones_end(cost: Cost, lower: float) -> None:
    short, long = times(cost, 0.7, ours(cost))
    old_short, old_long = times(cost, 0.7, first_come)
    assert p95(short) * lower < p95(old_short)
    assert max(long) < 1.5 * max(old_long)


@pytest.mark.parametrize(("name", "lower"), [("thin", 8), ("micro", 5), ("wide", 5)])
def test_with_measured_costs_and_padding_too(name: str, lower: float) -> None:
    cost = MEASURED[name]
    short, long = times(cost, 0.7, ours(cost, fit), fit)
    old_short, old_long = times(cost, 0.7, first_come, fit)
    assert p95(short) * lower < p95(old_short)
    assert max(long) < 1.5 * max(old_long)


def learning(cost: Cost, meter: CostModel, hiccup: int = -1) -> Policy:
    """As the engine does: what calls cost is found out by making them. One may take long."""
    calls = 0

    def policy(running: Sequence[Fake], now: float) -> list[Fake]:
        nonlocal calls
        chosen = choose(running, meter.cost, {}, now, anything, fit)
        slow = 10 if calls == hiccup else 1
        work = fit(sum(p.rows for p in chosen)) * chosen[0].pixels
        meter.add(work, slow * call_s_of(chosen, cost, fit))
        calls += 1
        return chosen

    return policy


@pytest.mark.parametrize("name", MEASURED)
def test_that_sharing_pays_is_found_out(name: str) -> None:
    """After any number of calls that were all alike, and after one that took long by chance."""
    cost, meter = MEASURED[name], CostModel()
    alone = Fake(calls_left=101)
    simulate([alone], cost, learning(cost, meter))
    crowd = [Fake(calls_left=25) for _ in range(8)]
    simulate(crowd, cost, learning(cost, meter))
    one_by_one = 8 * 25 * cost.call_s(CROWD)
    assert max(p.ended for p in crowd) < one_by_one / 1.25
    later = [Fake(calls_left=25) for _ in range(80)]
    simulate(later, cost, learning(cost, meter, hiccup=1))
    assert max(p.ended for p in later) < 10 * one_by_one / 1.15


def test_a_share_at_which_sharing_does_not_pay_would_never_be_corrected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("imaged.engine.scheduling.cost_model.FIXED", 0.1)
    cost, meter = MEASURED["wide"], CostModel()
    simulate([Fake(calls_left=101)], cost, learning(cost, meter))
    crowd = [Fake(calls_left=25) for _ in range(8)]
    simulate(crowd, cost, learning(cost, meter))
    assert max(p.ended for p in crowd) > 0.99 * 8 * 25 * cost.call_s(CROWD)


def test_without_ageing_long_jobs_wait_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    _, long = times(LARGE, 0.85, ours(LARGE))
    monkeypatch.setattr(batching, "AGEING", 0.0)
    _, starved = times(LARGE, 0.85, ours(LARGE))
    assert max(long) < max(starved)


def test_a_flood_of_one_key_does_not_delay_another() -> None:
    """A hundred jobs of one key at once; another key's come now and then."""
    flood = [Fake(key_id=1, calls_left=20) for _ in range(100)]
    alone = 20 * LARGE.call_s(CROWD)
    others = [Fake(key_id=2, calls_left=20, arrived=10.0 * n) for n in range(1, 9)]
    simulate([*flood, *others], LARGE, ours(LARGE))
    assert max(p.ended - p.arrived for p in others) < 3 * alone


def test_the_meter_finds_the_line() -> None:
    meter = CostModel()
    meter.add(CROWD, SMALL.call_s(CROWD))
    first = meter.cost
    assert first.call_s(CROWD) == pytest.approx(SMALL.call_s(CROWD))
    for pictures in (1, 2, 3, 1, 4):
        meter.add(pictures * CROWD, SMALL.call_s(pictures * CROWD))
    assert meter.cost.fixed_s == pytest.approx(SMALL.fixed_s)
    assert meter.cost.pixel_s == pytest.approx(SMALL.pixel_s)


@given(st.lists(st.tuples(st.integers(1, 10**8), st.floats(1e-6, 100)), min_size=1))
def test_the_meter_never_gives_a_negative_cost(calls: list[tuple[int, float]]) -> None:
    meter = CostModel()
    for work, seconds in calls:
        meter.add(work, seconds)
    assert meter.cost.fixed_s >= -1e-9 and meter.cost.pixel_s >= 0
