"""From the start of a process to its first picture."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from bench.app import Effort, effort_options, main
from bench.code import ROOT
from bench.figures import Row, publish
from bench.rounds import Spread, compare

PROMPT = "a red house by a blue lake, snowed mountains, sunset"
STEPS = 20
TARGET = 2.5
IMPORTS = {
    "import of torch alone": "import torch",
    "imports of our engine": "import imaged.cli, imaged.engine.engine, imaged.engine.loading.load",
    "imports of the plain script": "import torch; from diffusers import StableDiffusionXLPipeline",
}


@main.command()
@effort_options(rounds=7)
def start(effort: Effort) -> None:
    """A cold process to its first picture: `imaged generate` against a plain script.

    Both make one picture of 512 px with 20 Euler steps and the shipped checkpoint `micro`; timed is
    the whole process, from its start to its exit (bench/sides/peer_script.py is the script). Files
    are in the page cache. The target is a ratio of at least 2.5.
    """
    import torch

    from bench.ceiling import ceilings
    from bench.sides.agree import agreement

    found = ceilings(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as data:
        ours, peer, other = (Path(data) / f"{name}.jpg" for name in ("ours", "peer", "other"))
        our_command, peer_command = generate(ours, 7), script(peer, 7)
        for command in (our_command, peer_command, generate(other, 8)):
            seconds(command, effort.threads)
        agreed = agreement(ours.read_bytes(), peer.read_bytes(), other.read_bytes())
        pair = compare(
            lambda _: seconds(our_command, effort.threads),
            lambda _: seconds(peer_command, effort.threads),
            effort.rounds,
            "start",
        )
    row = Row.of("start to first picture", "s", "lower", "plain script", pair, TARGET)
    publish("start", effort, [row, *_imports(effort)], found, agreed)


def _imports(effort: Effort) -> list[Row]:
    rows = []
    for what, code in IMPORTS.items():
        command = [sys.executable, "-c", code]
        times = [seconds(command, effort.threads) for _ in range(effort.rounds)]
        rows.append(Row(what, "s", ours=Spread.of(times)))
    return rows


def generate(file: Path, seed: int) -> list[str]:
    """Our command, away from any data folder."""
    words = ["generate", PROMPT, "--scheduler", "Euler", "--steps", str(STEPS)]
    words += ["--seed", str(seed), "--width", "512", "--height", "512", "--model", "micro"]
    return [sys.executable, "-m", "imaged", *words, "-o", str(file), "--data", str(file.parent)]


def script(file: Path, seed: int) -> list[str]:
    from imaged.catalogue.model import MICRO

    words = [str(MICRO), PROMPT, str(STEPS), str(seed), str(file)]
    return [sys.executable, str(ROOT / "bench" / "sides" / "peer_script.py"), *words]


def seconds(command: list[str], threads: int) -> float:
    """Wall seconds of a whole process."""
    from bench.sides.servers import environment

    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=environment(threads), capture_output=True, text=True, check=False
    )
    taken = time.perf_counter() - started
    if done.returncode:
        raise click.ClickException(f"{command[1:3]} failed: {done.stderr[-2000:]}")
    return taken
