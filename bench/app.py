"""What all benchmarks share: the group, the effort, the folder of their results."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds, seconds of each measurement in a round, CPU threads of each."""

    rounds: int
    seconds: float
    threads: int
    quick: bool  # to see that it runs: its figures never enter the document

    def choose(self, normal: int, quick: int) -> int:
        return quick if self.quick else normal


@click.group()
def main() -> None:
    """Benchmarks of imaged against the reference pipeline and other servers.

    Each command prints a table and writes its figures into build/bench. Both sides run on the
    same machine in one run, in turns (A B B A ...), with the same weights, the same number of
    threads and pictures that agree. A ratio above 1 says that imaged is better; it is a win only
    if it is above 1 in every round. `report` turns all figures into docs/benchmarks.md.

    Begin with `python -m bench single --quick`, which takes a minute and proves nothing.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every weight is made here


def effort_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--rounds, --seconds, --threads and --quick, given to the command as one `effort`."""

    def run(rounds: int, seconds: float, threads: int, quick: bool, **given: Any) -> Any:
        if quick:
            rounds, seconds = 1, 0.0
        return command(effort=Effort(rounds, seconds, threads or _cores(), quick), **given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__dict__.update(command.__dict__)  # click's options of the command itself
    for option in reversed(_EFFORT):
        option(run)
    return run


_EFFORT = (
    click.option(
        "--rounds",
        type=click.IntRange(1, 100),
        default=5,
        show_default=True,
        help="Rounds; each measures both sides once.",
    ),
    click.option(
        "--seconds",
        type=click.FloatRange(0, 600),
        default=3.0,
        show_default=True,
        help="Least length of one measurement.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(0, 1024),
        default=0,
        help="CPU threads of each side  [default: all cores]",
    ),
    click.option(
        "--quick", is_flag=True, help="One tiny round, to see that it runs. Enters no document."
    ),
)


def model_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--model",
        "names",
        multiple=True,
        type=click.Choice(["thin", "wide"]),
        default=["thin", "wide"],
        show_default=True,
        help="thin is bound by overhead, wide by arithmetic. May be given twice.",
    )(command)


def _cores() -> int:
    return len(os.sched_getaffinity(0))
