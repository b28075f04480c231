"""Whole jobs on the GPU: offline, over HTTP, and arriving at random."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from bench.app import Effort
from bench.ceiling import synchronise
from bench.figures import Row
from bench.gpu.sides import Bench, job
from bench.rounds import Pair, Spread, compare, each_round, percentile, seconds_each
from bench.sides.policies import Policy, at_once, batches, capacity, mix, one_at_a_time, run, trace
from imaged.params.image_params import ImageParams

OFFLINE_STEPS, HTTP_STEPS = 20, 30
Draw = Callable[[ImageParams], bytes]


def offline(bench: Bench, effort: Effort) -> list[Row]:
    """Pictures a second at the batch that suits each side best, 20 steps, guidance 8."""
    sizes = bench.pick([1, 2, 4, 8], [1, 2])
    best = _best(sizes, ours_rate, bench, effort)
    rows: list[Row] = []
    every: list[float] = []
    for name, pipe in bench.peers():
        theirs = _best(sizes, peer_rate, bench, effort, pipe)
        pair = compare(
            each_round(ours_rate, bench, effort, best),
            each_round(peer_rate, bench, effort, pipe, theirs),
            effort.rounds,
            name,
        )
        every += pair.ours
        what = f"{bench.pixels} px, {best} at once, the peer {theirs}"
        rows.append(Row.of(what, "pictures/s", "higher", name, pair))
    limit = 2.05 if bench.cuda else None
    what = f"{bench.pixels} px, {best} at once"
    return [Row(what, "pictures/s", "higher", Spread.of(every), limit=limit), *rows]


def _best(sizes: Sequence[int], rate: Callable[..., float], *given: Any) -> int:
    """The batch of the highest rate, each tried twice so that the first call's work is over."""
    return max(sizes, key=lambda n: (rate(*given, n), rate(*given, n))[1])


def ours_rate(bench: Bench, effort: Effort, at_a_time: int) -> float:
    """Pictures a second when `at_a_time` jobs are kept in the engine."""
    engine = bench.engine
    amount = effort.choose(max(8, 2 * at_a_time), at_a_time)
    waiting = [job(bench.pixels, n, effort.choose(OFFLINE_STEPS, 2)) for n in range(amount)]
    synchronise(bench.device)
    started, made = time.perf_counter(), 0
    names = count()
    running = 0
    while made < amount:
        while waiting and running < at_a_time:
            engine.submit(f"offline {next(names)}", waiting.pop())
            running += 1
        for outcome in engine.tick():
            if outcome.error is not None:
                raise outcome.error
            made, running = made + 1, running - 1
    synchronise(bench.device)
    return amount / (time.perf_counter() - started)


def peer_rate(bench: Bench, effort: Effort, pipe: Any, images: int) -> float:
    """Pictures a second by calls of the pipeline with so many prompts."""
    prompts = [job(bench.pixels, n).prompt for n in range(images)]
    calls = effort.choose(max(2, 8 // images), 1)
    synchronise(bench.device)
    started = time.perf_counter()
    for _ in range(calls):
        pipe(
            prompts,
            num_inference_steps=effort.choose(OFFLINE_STEPS, 2),
            guidance_scale=8.0,
            width=bench.pixels,
            height=bench.pixels,
        )
    synchronise(bench.device)
    return calls * images / (time.perf_counter() - started)


def over_http(bench: Bench, effort: Effort) -> list[Row]:
    """One picture at an idle server, from the request to the bytes."""
    from bench.sides.servers import async_server, imaged_server, lock_server

    device = bench.device.type
    rows: list[Row] = []
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ours = stack.enter_context(
            imaged_server(bench.folder, data, effort.threads, IMAGED_GRAPHS="on")
        ).picture
        where = (bench.folder, data, effort.threads, device)
        peers = [("FastAPI, one at a time", stack.enter_context(lock_server(*where)).picture)]
        if bench.diffusers is not None:
            peer = stack.enter_context(async_server(bench.diffusers, *where))
            peers.append(("server-async", peer.picture))
        bench.agreed = _same_pictures(bench, ours, peers[0][1])
        for name, theirs in peers:
            rows += _http_rows(bench, effort, name, ours, theirs)
    return rows


def _same_pictures(bench: Bench, ours: Draw, theirs: Draw) -> dict[str, float]:
    from bench.sides.agree import agreement

    one, other = (job(bench.pixels, n, HTTP_STEPS) for n in (1, 2))
    return agreement(ours(one), theirs(one), ours(other), bench.levels)


def _http_rows(
    bench: Bench,
    effort: Effort,
    name: str,
    ours: Draw,
    theirs: Draw,
) -> list[Row]:
    numbers = count(1)

    def timed(draw: Draw) -> float:
        one = job(bench.pixels, 0, HTTP_STEPS)
        return seconds_each(
            lambda: draw(replace(one, prompt=f"a castle, number {next(numbers)}")), effort.seconds
        )

    timed(ours), timed(theirs)  # both warm
    pair = compare(lambda _: timed(ours), lambda _: timed(theirs), effort.rounds, name)
    what = f"HTTP to picture, {bench.pixels} px, {HTTP_STEPS} steps"
    row = Row.of(what, "s", "lower", name, pair)
    return [replace(row, limit=0.85) if bench.cuda else row]


def arrivals(bench: Bench, effort: Effort) -> list[Row]:
    """Mixed steps and sizes at three loads, under our rule and three others on the same engine."""
    sizes = bench.pick([512, 768, 1024], [512])
    mixed = mix(effort.quick, sizes)
    jobs = effort.choose(5 * len(mixed), 4)
    run(bench.engine, trace(jobs, 1e3, 999, mixed), at_once)  # warm, in many mixtures
    full = capacity(bench.engine, mixed, at_once, effort.choose(2 * len(mixed), 4))
    bench.ceilings["jobs/s, full"] = full
    timers = [5.0, 0.05] if bench.cuda else [0.1, 0.01]
    rules = {f"batches of 8, {timer:g} s": batches(8, timer) for timer in timers}
    rules["one at a time"] = one_at_a_time
    rows = []
    for load in bench.pick([0.5, 0.7, 0.85], [0.7]):
        for name, policy in rules.items():
            rows += _rule_rows(bench, effort, mixed, jobs, load, load * full, name, policy)
    return rows


def _rule_rows(
    bench: Bench,
    effort: Effort,
    mixed: Sequence[ImageParams],
    jobs: int,
    load: float,
    a_second: float,
    name: str,
    policy: Policy,
) -> list[Row]:
    """p50 and p95 of all jobs and p95 of the shortest; each round's trace is played once a side."""
    found: dict[tuple[bool, int], tuple[float, float, float]] = {}

    def p50(ours: bool, n: int) -> float:
        trail = trace(jobs, a_second, n, mixed)
        ran = run(bench.engine, trail, at_once if ours else policy)
        least = min(params.num_inference_steps for params in mixed)
        pairs = zip(ran.waits, trail, strict=True)
        short = [wait for wait, a in pairs if a.params.num_inference_steps == least]
        found[ours, n] = (
            Spread.of(ran.waits).median,
            percentile(ran.waits, 0.95),
            percentile(short, 0.95),
        )
        return found[ours, n][0]

    compare(lambda n: p50(True, n), lambda n: p50(False, n), effort.rounds, f"{load:.0%} {name}")
    goals = (("p50 of all", 3.0 if "5 s" in name else None), ("p95 of all", None))
    rows = []
    for k, (what, target) in enumerate((*goals, ("p95 of the shortest", 5.0))):
        pair = _pair(found, k, effort.rounds)
        rows.append(Row.of(f"load {load:.0%}, {what}", "s", "lower", name, pair, target))
    return rows


def _pair(found: dict[tuple[bool, int], tuple[float, float, float]], k: int, rounds: int) -> Pair:
    ours, peer = (tuple(found[side, n][k] for n in range(rounds)) for side in (True, False))
    return Pair(ours, peer)
