"""One picture at an idle server, against the pipeline called in this process."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from bench.app import Effort, effort_options, main, model_option
from bench.figures import Row, publish
from bench.rounds import compare, seconds_each
from bench.sides.models import PIXELS, checkpoint
from imaged.params.image_params import ImageParams

TARGET, QUARTILE = 1.1, 1.0  # of the median and of the lower quartile


@main.command()
@model_option
@effort_options(rounds=9, seconds=4)
def single(names: tuple[str, ...], effort: Effort) -> None:
    """One picture: our HTTP server against the diffusers pipeline without any server.

    From the submit of a v1 request to the bytes of the JPEG, against a call of
    StableDiffusionXLPipeline in this process and the same JPEG encoding: 25 steps of DPM++ 2M
    Karras, guidance 7, 512 px. Every picture has a prompt of its own. The targets: 1.1 times as
    fast in the median of the rounds, and no slower at its lower quartile.
    """
    import torch

    from bench.ceiling import ceilings

    torch.set_num_threads(effort.threads)
    found = ceilings(torch.device("cpu"))
    rows, agreed = [], {}
    for name in names:
        row, levels = _measure(name, effort)
        rows.append(row)
        agreed.update({f"{name}: {what}": figure for what, figure in levels.items()})
    publish("single", effort, rows, found, agreed)


def _measure(name: str, effort: Effort) -> tuple[Row, dict[str, float]]:
    from bench.sides import peer
    from bench.sides.agree import agreement
    from bench.sides.servers import imaged_server

    folder = checkpoint(name)
    pipe: Any = peer.pipeline(folder)
    first = request(0)
    with (
        tempfile.TemporaryDirectory() as data,
        imaged_server(folder, Path(data), effort.threads) as server,
    ):
        another = server.picture(replace(first, seed=first.seed + 1))
        levels = agreement(server.picture(first), peer.jpeg(peer.draw(pipe, first)), another)
        ours, theirs = count(1), count(1)
        pair = compare(
            lambda _: seconds_each(lambda: server.picture(request(next(ours))), effort.seconds),
            lambda _: seconds_each(
                lambda: peer.jpeg(peer.draw(pipe, request(next(theirs)))), effort.seconds
            ),
            effort.rounds,
            name,
        )
    what, peer_name = f"{name}: one picture", "pipeline in process"
    return Row.of(what, "s", "lower", peer_name, pair, TARGET, QUARTILE), levels


def request(n: int) -> ImageParams:
    """The n-th request: the same work, another prompt and seed."""
    return ImageParams(
        f"a red house by a lake, number {n}", seed=n, img_width=PIXELS, img_height=PIXELS
    )
