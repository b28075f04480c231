"""Eight clients at once, each wanting something else."""

from __future__ import annotations

import io
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from bench.app import Effort, diffusers_option, effort_options, main, model_option
from bench.figures import Row, publish
from bench.rounds import compare
from bench.sides.models import PIXELS, checkpoint
from imaged.params.image_params import ImageParams

CLIENTS = 8
SAMPLERS = ("Euler", "Euler a", "DDIM", "DPM++ 2M Karras", "UniPC")
STEPS = (20, 25, 30, 40)
TARGETS = {"thin": 3.0, "wide": 1.3}
PICTURES = 2 * CLIENTS  # of each side in each round
Draw = Callable[[ImageParams], bytes]


@main.command()
@model_option
@diffusers_option
@click.option(
    "--pictures",
    type=click.IntRange(2, 10_000),
    default=PICTURES,
    show_default=True,
    help="Of each side in each round.",
)
@effort_options()
def crowd(names: tuple[str, ...], diffusers: Path | None, pictures: int, effort: Effort) -> None:
    """Pictures a second at eight clients: our server against two others.

    Each client sends its next request when the last is answered: 512 px, 20 to 40 steps, five
    samplers of one UNet call a step, guidance 3 to 9. The peers are a FastAPI server that calls
    the pipeline for one at a time (install `.[bench]`) and diffusers' own examples/server-async,
    which takes only prompt and steps and chooses the rest itself (guidance 5, the checkpoint's
    sampler): the UNet is called as often, on as many rows. Targets: 3 times as many with `thin`,
    1.3 times with `wide`.
    """
    import torch

    from bench.ceiling import ceilings

    torch.set_num_threads(effort.threads)
    found = ceilings(torch.device("cpu"))
    rows: list[Row] = []
    agreed: dict[str, float] = {}
    for name in names:
        more, levels = _measure(name, diffusers, pictures, effort)
        rows += more
        agreed.update({f"{name}: {what}": figure for what, figure in levels.items()})
    publish("crowd", effort, rows, found, agreed)


def _measure(
    name: str, diffusers: Path | None, pictures: int, effort: Effort
) -> tuple[list[Row], dict[str, float]]:
    from bench.sides.agree import agreement
    from bench.sides.servers import async_server, imaged_server, lock_server

    folder, target = checkpoint(name), TARGETS[name]
    amount = effort.choose(pictures, 2)
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ours = stack.enter_context(imaged_server(folder, data, effort.threads, CLIENTS)).picture
        lock = stack.enter_context(lock_server(folder, data, effort.threads)).picture
        first = requests(1, seed=99)[0]
        for seed in range(effort.choose(96, 98), 99):  # warm: sharing is tried here
            rate(ours, requests(CLIENTS, seed=seed))
        another = ours(replace(first, seed=first.seed + 1))
        levels = agreement(ours(first), lock(first), another)
        rows = [_against(name, "FastAPI, one at a time", ours, lock, target, amount, effort)]
        if diffusers is None:
            click.echo("server-async is NOT measured: give --diffusers CLONE", err=True)
            note = "no clone of diffusers was given"
            return [*rows, Row(_what(name), peer_name="server-async", note=note)], levels
        peer = stack.enter_context(async_server(diffusers, folder, data, effort.threads)).picture
        check_picture(peer(first))
        return [*rows, _against(name, "server-async", ours, peer, target, amount, effort)], levels


def _against(
    name: str, peer_name: str, ours: Draw, peer: Draw, target: float, amount: int, effort: Effort
) -> Row:
    pair = compare(
        lambda n: rate(ours, requests(amount, seed=n)),
        lambda n: rate(peer, requests(amount, seed=n)),
        effort.rounds,
        f"{name}, {peer_name}:",
    )
    return Row.of(_what(name), "pictures/s", "higher", peer_name, pair, target)


def _what(name: str) -> str:
    return f"{name}: {CLIENTS} clients"


def requests(amount: int, seed: int) -> list[ImageParams]:
    """The same mix for every seed in another order, each with a prompt of its own."""
    order = random.Random(seed)
    mixed = [
        ImageParams(
            f"a boat on a lake, number {seed} {n}",
            scheduler=SAMPLERS[n % len(SAMPLERS)],
            num_inference_steps=STEPS[n % len(STEPS)],
            guidance_scale=3.0 + n % 7,
            seed=1000 * seed + n,
            img_width=PIXELS,
            img_height=PIXELS,
        )
        for n in range(amount)
    ]
    order.shuffle(mixed)
    return mixed


def rate(draw: Draw, wanted: Sequence[ImageParams]) -> float:
    """Pictures a second with CLIENTS at once."""
    started = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        made: Iterator[Any] = pool.map(draw, wanted)
        count = sum(1 for _ in made)
    return count / (time.perf_counter() - started)


def check_picture(content: bytes) -> None:
    """Where seeds cannot be given: at least a picture of the right size that is not flat."""
    import numpy as np
    from PIL import Image

    picture = Image.open(io.BytesIO(content))
    flat = np.ptp(np.asarray(picture.convert("RGB"))) == 0
    if picture.size != (PIXELS, PIXELS) or flat:
        raise click.ClickException("server-async did not make a picture: nothing was measured")
