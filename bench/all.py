"""Every benchmark of the CPU by one command, and the report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path

import click

from bench.app import cores, diffusers_option, main, quick_option, threads_option
from bench.code import ROOT, Tree

PARTS = ("single", "crowd", "waiting", "start", "exact", "savings", "recovery", "polls")
INSTALL = 'pip install -c constraints.txt -e ".[dev,bench]"'
#: A package, and the parts that need it.
PACKAGES = {
    "diffusers": ("single", "crowd", "start", "savings"),
    "transformers": ("single", "crowd", "waiting", "start", "exact", "savings"),
    "fastapi": ("crowd", "polls"),
    "matplotlib": ("waiting",),
}


@main.command("all")
@click.option(
    "--without", multiple=True, type=click.Choice(PARTS), help="Part to leave out; may be repeated."
)
@diffusers_option
@threads_option
@quick_option
def everything(without: tuple[str, ...], diffusers: Path | None, threads: int, quick: bool) -> None:
    """Every benchmark of the CPU, one after the other, then `report`: most of an hour.

    Each is the command of its name with its own defaults, in a process of its own. What they need
    is looked for before the first begins. One that fails is named at the end, and leaves the
    others alone. `full` and `bf16`, which want 24 GB of memory, and `gpu` are not among them.
    """
    parts = [part for part in PARTS if part not in without]
    if lacks := missing(parts, diffusers):
        hint = "nothing was measured; --without PART leaves one out"
        raise click.ClickException("\n  ".join(["missing:", *lacks, hint]))
    warn(parts, diffusers)
    began, failed = time.monotonic(), []
    for n, part in enumerate(parts, 1):
        started = time.monotonic()
        click.echo(f"== {n} of {len(parts)}: {part}", err=True)
        done = subprocess.run(command(part, diffusers, threads, quick), cwd=ROOT, check=False)
        result = f"FAILED ({done.returncode})" if done.returncode else "done"
        failed += [part] if done.returncode else []
        click.echo(f"== {n} of {len(parts)}: {part} {result} after {span(started)}", err=True)
    if not quick and subprocess.run(words("report"), cwd=ROOT, check=False).returncode:
        failed.append("report")
    left_out = ", ".join(("full", "bf16", "gpu", *without))
    click.echo(f"== all of it took {span(began)}; left out: {left_out}", err=True)
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")


def missing(parts: Collection[str], diffusers: Path | None) -> list[str]:
    """What has to be there and is not, with the parts that need it."""
    found = []
    for package, users in PACKAGES.items():
        wanting = [part for part in parts if part in users]
        if wanting and find_spec(package) is None:
            found.append(f"{', '.join(wanting)}: the package {package}: {INSTALL}")
    if "polls" in parts and shutil.which("wrk") is None:
        found.append("polls: the load generator wrk: apt-get install wrk")
    if "polls" in parts and cores() < 2:
        found.append("polls: a second core")
    if diffusers and not (diffusers / "examples" / "server-async" / "serverasync.py").is_file():
        found.append(f"crowd: examples/server-async/serverasync.py in {diffusers}")
    return found


def warn(parts: Sequence[str], diffusers: Path | None) -> None:
    """Of what makes the figures worth less."""
    tree = Tree()
    if not all(tree.code(part).commit for part in parts):
        click.echo("warning: the code is not committed; a release refuses such figures", err=True)
    if (load := os.getloadavg()[0]) > 0.5:
        click.echo(f"warning: something else is running here (load {load:.1f})", err=True)
    if "crowd" in parts and diffusers is None:
        click.echo("warning: server-async is left out: give --diffusers CLONE", err=True)


def command(part: str, diffusers: Path | None, threads: int, quick: bool) -> list[str]:
    """As one would type it."""
    more = (
        ["--diffusers", os.path.relpath(diffusers, ROOT)] if part == "crowd" and diffusers else []
    )
    more += ["--threads", str(threads)] if threads else []
    return [*words(part), *more, *(["--quick"] if quick else [])]


def words(name: str) -> list[str]:
    return [sys.executable, "-m", "bench", name]


def span(since: float) -> str:
    """`3 min 20 s`"""
    minutes, seconds = divmod(round(time.monotonic() - since), 60)
    return f"{minutes} min {seconds} s"
