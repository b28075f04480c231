"""How long a short job waits among long ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from bench.app import Effort, effort_options, main
from bench.figures import Row, publish
from bench.rounds import Spread, compare, percentile
from bench.sides.models import checkpoint
from bench.sides.policies import Policy, Ran, at_once, capacity, mix, one_at_a_time, run, trace
from imaged.engine.engine import Engine
from imaged.params.image_params import ImageParams

LOADS = (0.3, 0.5, 0.7, 0.85)
LOAD, TARGET = 0.7, 5.0
PEER = "one at a time"


@main.command()
@click.option(
    "--model",
    "names",
    multiple=True,
    type=click.Choice(["thin", "wide"]),
    default=["thin"],
    show_default=True,
    help="Checkpoint; may be given twice.",
)
@click.option(
    "--jobs", type=click.IntRange(4, 10_000), default=30, show_default=True, help="In one trace."
)
@effort_options()
def waiting(names: tuple[str, ...], jobs: int, effort: Effort) -> None:
    """Short jobs among long ones: step-level batching against first come, first served.

    Jobs of 10, 20, 30 and 50 steps in equal parts arrive at random (Poisson) at 70 % of what our
    engine can do when it is full. One side lets them join as they come, the other runs the same
    engine with one job at a time; both play the same trace, a new one in each round. Compared is
    the time within which 95 % of the 10-step jobs were done. The target is a fifth: a ratio of at
    least 5. A second row loads both with 70 % of what one at a time can do. A sweep over four
    loads is for the plot. The engine is called in this process: the API begins at 20 steps.
    """
    import torch

    from bench.ceiling import ceilings
    from imaged.engine.loading.load import load

    torch.set_num_threads(effort.threads)
    found = ceilings(torch.device("cpu"))
    jobs = effort.choose(jobs, 4)
    rows: list[Row] = []
    curve: list[dict[str, Any]] = []
    for name in names:
        engine = Engine(load(checkpoint(name), torch.device("cpu")))
        mixed = mix(effort.quick)
        rows += measure(name, engine, mixed, jobs, effort, found)
        curve += sweep(name, engine, mixed, jobs, found[_capacity(name)])
    publish("waiting", effort, rows, found, curve=curve)


def measure(
    name: str,
    engine: Engine,
    mixed: Sequence[ImageParams],
    jobs: int,
    effort: Effort,
    found: dict[str, float],
) -> list[Row]:
    """Both capacities, into `found`, and short jobs' p95 at 70 % of either."""
    capacity(engine, mixed, at_once, len(mixed))  # warm
    full = capacity(engine, mixed, at_once, effort.choose(32, 4))
    single = capacity(engine, mixed, one_at_a_time, effort.choose(8, 4))
    found[_capacity(name)], found[f"{name}: jobs/s, {PEER}"] = full, single
    return [
        _row(f"{name}: short jobs' p95, {LOAD:.0%} of {what}", engine, mixed, jobs, rate, effort, t)
        for what, rate, t in (
            ("our capacity", LOAD * full, TARGET),
            ("the peer's capacity", LOAD * single, None),
        )
    ]


def _capacity(name: str) -> str:
    return f"{name}: jobs/s, full"


def _row(
    what: str,
    engine: Engine,
    mixed: Sequence[ImageParams],
    jobs: int,
    a_second: float,
    effort: Effort,
    target: float | None,
) -> Row:
    shortest = min(params.num_inference_steps for params in mixed)

    def p95(policy: Policy, n: int) -> float:
        arrivals = trace(jobs, a_second, n, mixed)
        ran = run(engine, arrivals, policy)
        return percentile(
            [
                wait
                for wait, arrival in zip(ran.waits, arrivals, strict=True)
                if arrival.params.num_inference_steps == shortest
            ],
            0.95,
        )

    pair = compare(lambda n: p95(at_once, n), lambda n: p95(one_at_a_time, n), effort.rounds, what)
    return Row.of(what, "s", "lower", PEER, pair, target)


def sweep(
    name: str, engine: Engine, mixed: Sequence[ImageParams], jobs: int, full: float
) -> list[dict[str, Any]]:
    """One trace at each load under both rules: p95 of all and of short jobs, pictures a second."""
    points = []
    for load in LOADS:
        arrivals = trace(jobs, load * full, 1000, mixed)
        shortest = mixed[0].num_inference_steps
        short = [n for n, a in enumerate(arrivals) if a.params.num_inference_steps == shortest]
        for who, policy in (("imaged", at_once), (PEER, one_at_a_time)):
            ran = run(engine, arrivals, policy)
            points.append({"model": name, "load": load, "who": who, **_point(ran, short)})
            click.echo(f"  {name} at {load:.0%}, {who}: {ran.rate:.3g} pictures/s", err=True)
    return points


def _point(ran: Ran, short: Sequence[int]) -> dict[str, float]:
    return {
        "rate": ran.rate,
        "p50": Spread.of(ran.waits).median,
        "p95": percentile(ran.waits, 0.95),
        "short_p95": percentile([ran.waits[n] for n in short], 0.95),
    }
