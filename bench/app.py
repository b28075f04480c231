"""What all commands share: the group, the effort, the folder of their results."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from bench.code import ROOT, Tree
from bench.company import Company

BUILD = ROOT / "build" / "bench"
_RUNS = (
    "bf16",
    "crowd",
    "exact",
    "polls",
    "recovery",
    "savings",
    "sigmas",
    "single",
    "start",
    "waiting",
)
#: Each command, and the module that adds it to `main`; in the order of --help.
COMMANDS = dict(
    sorted(
        {
            **{name: f"bench.{name}" for name in ("all", "check", "report")},
            **{name: f"bench.runs.{name}" for name in _RUNS},
            **{name: f"bench.{name}.command" for name in ("full", "gpu")},
            "models": "bench.sides.models",
        }.items()
    )
)


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds, seconds of each measurement in a round, CPU threads of each."""

    rounds: int
    seconds: float
    threads: int
    quick: bool  # to see that it runs: its figures never enter the document
    tree: Tree = field(default_factory=Tree, repr=False)  # as it was before
    company: Company = field(default_factory=Company, repr=False)  # since then

    def choose(self, normal: int, quick: int) -> int:
        return quick if self.quick else normal


class Commands(click.Group):
    """Imports a command when it is asked for: `check` is to be quick, and torch takes seconds."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            import_module(COMMANDS[cmd_name])
        return super().get_command(ctx, cmd_name)


@click.group(cls=Commands)
def main() -> None:
    """Benchmarks of imaged against the reference pipeline and other servers.

    Each command prints a table and writes its figures into build/bench. Both sides run on the
    same machine in one run, in turns (A B B A ...), with the same weights, the same number of
    threads and pictures that agree. A ratio above 1 says that imaged is better; it is a win only
    if it is above 1 in every round. `report` turns all figures into docs/benchmarks.md.

    `all` runs those of the CPU and `report`, which takes most of an hour. Begin with `python -m
    bench single --quick`, which takes a minute and proves nothing.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every weight is made here


Command = Callable[..., Any]


def effort_options(rounds: int = 5, seconds: float = 3.0) -> Callable[[Command], Command]:
    """--rounds, --seconds, --threads and --quick, given to the command as one `effort`."""

    def decorate(command: Command) -> Command:
        def run(rounds: int, seconds: float, threads: int, quick: bool, **given: Any) -> Any:
            if quick:
                rounds, seconds = 1, 0.0
            return command(effort=Effort(rounds, seconds, threads or cores(), quick), **given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__dict__.update(command.__dict__)  # click's options of the command itself
        for option in (quick_option, threads_option, _seconds(seconds), _rounds(rounds)):
            option(run)
        return run

    return decorate


def _rounds(default: int) -> Callable[[Command], Command]:
    return click.option(
        "--rounds",
        type=click.IntRange(1, 100),
        default=default,
        show_default=True,
        help="Rounds; each measures both sides once.",
    )


def _seconds(default: float) -> Callable[[Command], Command]:
    return click.option(
        "--seconds",
        type=click.FloatRange(0, 600),
        default=default,
        show_default=True,
        help="Least length of one measurement, where its length can be chosen.",
    )


threads_option = click.option(
    "--threads",
    type=click.IntRange(0, 1024),
    default=0,
    help="CPU threads of each side  [default: all cores]",
)
quick_option = click.option(
    "--quick", is_flag=True, help="One tiny round, to see that it runs. Enters no document."
)
diffusers_option = click.option(
    "--diffusers",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A clone of https://github.com/huggingface/diffusers, for its examples/server-async.",
)


def _models(names: list[str], text: str) -> Callable[[Command], Command]:
    return click.option(
        "--model",
        "names",
        multiple=True,
        type=click.Choice(names),
        default=names,
        show_default=True,
        help=text,
    )


model_option = _models(
    ["thin", "wide"], "thin is bound by overhead, wide by arithmetic. May be given twice."
)
any_model_option = _models(["thin", "wide", "micro"], "Checkpoint; may be given several times.")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))
