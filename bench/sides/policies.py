"""Jobs that arrive at random, run on one engine under different rules of who goes when."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.sides.models import PIXELS
from imaged.engine.engine import Engine
from imaged.errors import ImagedError
from imaged.params.image_params import ImageParams

STEPS = (10, 20, 30, 50)  # of short jobs and long ones


@dataclass(frozen=True)
class Arrival:
    """A job and when it comes, in seconds from the start."""

    at: float
    params: ImageParams


@dataclass(frozen=True)
class Ran:
    """How a trace went: seconds from arrival to picture, and pictures a second over all."""

    waits: tuple[float, ...]  # in the order of the trace
    rate: float


Policy = Callable[[Sequence[Arrival], float, int], int]
"""(waiting jobs as they came, seconds the first has waited, jobs running) -> how many start."""


def at_once(waiting: Sequence[Arrival], waited_s: float, running: int) -> int:
    """Ours: every job joins between two UNet calls."""
    return len(waiting)


def one_at_a_time(waiting: Sequence[Arrival], waited_s: float, running: int) -> int:
    """First come, first served: the next starts when the last is out."""
    return 0 if running else min(1, len(waiting))


def batches(most: int, timer_s: float) -> Policy:
    """Static batches: full or after a while, and only when the last batch is out."""

    def policy(waiting: Sequence[Arrival], waited_s: float, running: int) -> int:
        due = len(waiting) >= most or waited_s >= timer_s
        return 0 if running or not due else min(most, len(waiting))

    return policy


def mix(quick: bool, sizes: Sequence[int] = (PIXELS,)) -> list[ImageParams]:
    """Every number of steps at every size, the shortest first."""
    return [
        ImageParams(
            "a boat on a lake",
            scheduler="Euler",
            num_inference_steps=steps // 5 if quick else steps,
            seed=steps,
            img_width=size,
            img_height=size,
        )
        for steps in STEPS
        for size in sizes
    ]


def trace(amount: int, a_second: float, seed: int, jobs: Sequence[ImageParams]) -> list[Arrival]:
    """Poisson arrivals of jobs drawn evenly from `jobs`, each as often as the others."""
    dice = random.Random(seed)
    kinds = [jobs[n % len(jobs)] for n in range(amount)]
    dice.shuffle(kinds)
    at, arrivals = 0.0, []
    for params in kinds:
        at += dice.expovariate(a_second)
        arrivals.append(Arrival(at, params))
    return arrivals


def run(engine: Engine, arrivals: Sequence[Arrival], policy: Policy) -> Ran:
    """Play a trace in real time. Raises the error of a job that fails."""
    started = time.perf_counter()
    begun = 0
    waits: dict[int, float] = {}
    while len(waits) < len(arrivals):
        now = time.perf_counter() - started
        come = [a for a in arrivals[begun:] if a.at <= now]
        waited = now - come[0].at if come else 0.0
        for arrival in come[: policy(come, waited, begun - len(waits))]:
            engine.submit(str(begun), arrival.params)
            begun += 1
        if engine.idle:
            time.sleep(0.001)
        for outcome in engine.tick():
            if outcome.error is not None:
                raise _named(outcome.error)
            n = int(outcome.job_id)
            waits[n] = time.perf_counter() - started - arrivals[n].at
    total = time.perf_counter() - started - arrivals[0].at
    return Ran(tuple(waits[n] for n in range(len(arrivals))), len(arrivals) / total)


def _named(error: ImagedError) -> ImagedError:
    error.add_note("a job of the benchmark failed")
    return error


def capacity(engine: Engine, jobs: Sequence[ImageParams], policy: Policy, amount: int) -> float:
    """Jobs a second when all are there from the start."""
    return run(engine, [Arrival(0.0, jobs[n % len(jobs)]) for n in range(amount)], policy).rate
