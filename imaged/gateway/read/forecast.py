"""Forecast of a job's wait and run time, from completed jobs and the queue. Pure.

A worker shares its device among its slots: a job's device time is its share of the time it ran. The
jobs ahead are simulated in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from imaged.store.jobs.workload import Open, Pace, Past

FEW = 5  # with fewer jobs the spread is not estimated
WIDE = (0.5, 2.0)  # but taken as this


@dataclass(frozen=True)
class Interval:
    """Seconds: the expectation, and the 10th and 90th percentiles."""

    low: float
    expected: float
    high: float

    @classmethod
    def around(cls, seconds: float, spread: tuple[float, float]) -> Interval:
        return cls(seconds * min(spread[0], 1.0), seconds, seconds * max(spread[1], 1.0))


@dataclass(frozen=True)
class Forecast:
    """jobs: the number of completed jobs behind it."""

    wait: Interval
    run: Interval
    jobs: int


def forecast(model: str, work: float, pace: Pace, slots: int) -> Forecast | None:
    """For a job submitted now, work in micro-dollars, if nobody jumps the queue. None without
    workers or completed jobs of this model.
    """
    if not pace.workers:
        return None
    used = device_seconds(pace.past, pace.workers)
    rates: dict[str, list[float]] = {}
    for job, seconds in zip(pace.past, used, strict=True):
        rates.setdefault(job.model, []).append(seconds / job.work)
    if model not in rates:
        return None
    usual = {name: median(found) for name, found in rates.items()}
    other = median(rate for found in rates.values() for rate in found)
    mine = Open(model, work)
    needs = [job.work * usual.get(job.model, other) for job in (*pace.ahead, mine)]
    begins, ends = simulate(needs, pace.workers * slots, pace.workers)
    spread = _spread([rate / usual[model] for rate in rates[model]])
    return Forecast(
        Interval.around(begins, spread), Interval.around(ends - begins, spread), len(rates[model])
    )


def device_seconds(past: Sequence[Past], devices: int) -> list[float]:
    """Device seconds of each job: while more jobs ran than there are devices, its share."""
    marks = sorted({mark for job in past for mark in (job.started_at, job.finished_at)})
    used = [0.0] * len(past)
    for begin, end in pairwise(marks):
        open_now = [n for n, job in enumerate(past) if job.started_at <= begin < job.finished_at]
        for n in open_now:
            used[n] += (end - begin) * min(1.0, devices / len(open_now))
    return used


def simulate(needs: Sequence[float], slots: int, devices: int) -> tuple[float, float]:
    """Simulate: when the last of these jobs begins and ends, taken in order into the slots."""
    now, begins, inside = 0.0, math.inf, list[float]()
    waiting = list(needs[::-1])
    while waiting or inside:
        while waiting and len(inside) < slots:
            inside.append(waiting.pop())
            if not waiting:
                begins, mine = now, inside[-1]
        speed = min(1.0, devices / len(inside))
        step = min(inside)
        now += step / speed
        if not waiting:
            mine -= step
            if mine <= 0:
                break
        inside = [need - step for need in inside if need > step]
    return begins, now


def _spread(ratios: Sequence[float]) -> tuple[float, float]:
    """10th and 90th percentile."""
    if len(ratios) < FEW:
        return WIDE
    ordered = sorted(ratios)
    return ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
