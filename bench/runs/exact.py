"""What it costs that a picture keeps its bits in company."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.app import Effort, any_model_option, effort_options, main
from bench.figures import Row, publish
from bench.rounds import compare, each_round, seconds_each
from bench.sides.models import checkpoint
from bench.sides.policies import Policy, at_once, capacity, one_at_a_time
from imaged.catalogue.model import MICRO
from imaged.engine.engine import Engine
from imaged.params.image_params import ImageParams
from imaged.sampling.schedulers import SCHEDULERS

PEER = "free numbers of rows"
STEPS = 6  # and one more for each job of a crowd


@main.command()
@any_model_option
@effort_options(seconds=1)
def exact(names: tuple[str, ...], effort: Effort) -> None:
    """The determinism class `exact` against `close`, on one engine.

    Exact calls have 2, 4, 8 or 16 rows that were seen to give the same bits, and are padded to
    these; close ones have as many rows as there are. Pictures a second of crowds of eight, five
    and three with 6 to 13 steps, mixed samplers and guidance, the last of eight without (a single
    row), and of one such picture alone.
    """
    import torch

    from bench.ceiling import ceilings
    from imaged.engine.loading.load import load

    torch.set_num_threads(effort.threads)
    found = ceilings(torch.device("cpu"))
    rows: list[Row] = []
    for name in names:
        nets = load(MICRO if name == "micro" else checkpoint(name), torch.device("cpu"))
        rows += measure(name, nets, effort)
    publish("exact", effort, rows, found)


def measure(name: str, nets: Any, effort: Effort) -> list[Row]:
    sides = Engine(nets), Engine(nets, exact=False)
    crowd = [job(n, effort.choose(STEPS, 2)) for n in range(8)]
    cases: list[tuple[str, list[ImageParams], Policy]] = [
        ("a crowd of eight", crowd, at_once),
        ("a crowd of five", crowd[:5], at_once),
        ("a crowd of three", crowd[:3], at_once),
        ("one alone", crowd[:1], one_at_a_time),
        ("one alone at guidance 1", [replace(crowd[0], guidance_scale=1.0)], one_at_a_time),
    ]
    found = []
    for what, jobs, policy in cases:
        for engine in sides:
            rate(engine, jobs, policy, 0)  # warm: the numbers of rows are tried here
        ours, free = (each_round(rate, e, jobs, policy, effort.seconds) for e in sides)
        pair = compare(ours, free, effort.rounds, f"{name}: {what}")
        found.append(Row.of(f"{name}: {what}", "pictures/s", "higher", PEER, pair))
    return found


def rate(engine: Engine, jobs: list[ImageParams], policy: Policy, least_s: float) -> float:
    """Pictures a second of these at once, again and again."""
    seconds = seconds_each(lambda: capacity(engine, jobs, policy, len(jobs)), least_s)
    return len(jobs) / seconds


def job(n: int, steps: int) -> ImageParams:
    """Guided pictures of one size, but for the last, which has a single row."""
    return ImageParams(
        f"a boat on a lake, {n} houses",
        scheduler=[s for s in SCHEDULERS if s not in ("Heun", "DPM2 Karras", "DPM2 a Karras")][n],
        num_inference_steps=steps + n,
        guidance_scale=1.0 if n == 7 else 4.0 + n,
        seed=n,
        img_width=512,
        img_height=512,
    )
