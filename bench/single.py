"""One picture at an idle server, against the pipeline called in this process."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from bench.app import Effort, effort_options, main, model_option
from bench.figures import Row, publish
from bench.models import PIXELS, checkpoint
from bench.rounds import compare, seconds_each
from imaged.params import ImageParams


@main.command()
@model_option
@effort_options
def single(names: tuple[str, ...], effort: Effort) -> None:
    """One picture: our HTTP server against the diffusers pipeline without any server.

    From the submit of a v1 request to the bytes of the JPEG, against a call of
    StableDiffusionXLPipeline in this process and the same JPEG encoding: 25 steps of DPM++ 2M
    Karras, guidance 7, 512 px. Every picture has a prompt of its own. The target is to be no
    slower: a ratio of at least 1.
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
    from bench import peer
    from bench.agree import agreement
    from bench.servers import imaged_server

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
    row = Row.of(f"{name}: one picture", "s", "lower", "pipeline in process", pair, target=1.0)
    return row, levels


def request(n: int) -> ImageParams:
    """The n-th request: the same work, another prompt and seed."""
    return ImageParams(
        f"a red house by a lake, number {n}", seed=n, img_width=PIXELS, img_height=PIXELS
    )
