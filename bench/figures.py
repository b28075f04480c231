"""What a benchmark leaves behind: a table on the screen and a JSON file."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from bench import app
from bench.app import Effort
from bench.code import Code, Tree
from bench.company import LOUD
from bench.rounds import Better, Pair, Spread, against_targets, verdict

COLUMNS = ("what", "unit", "imaged", "peer", "peer's", "ratio", "quartiles", "target", "verdict")


@dataclass(frozen=True)
class Row:
    """One line: ours, perhaps beside a peer's, perhaps with a target.

    target: what the ratio's median should reach. quartile: what its lower quartile should, with a
    target of the median only. limit: the bound of our own figure, in every round.
    Without `ours` it was not measured, and `note` says why.
    """

    what: str
    unit: str = ""
    better: Better = "lower"
    ours: Spread | None = None
    peer_name: str = ""
    peer: Spread | None = None
    ratio: Spread | None = None
    target: float | None = None
    quartile: float | None = None
    limit: float | None = None
    note: str = ""

    @classmethod
    def of(
        cls,
        what: str,
        unit: str,
        better: Better,
        peer_name: str,
        pair: Pair,
        target: float | None = None,
        quartile: float | None = None,
    ) -> Row:
        """From the rounds of a comparison."""
        ours, peer = Spread.of(pair.ours), Spread.of(pair.peer)
        ratio = pair.ratio(better)
        return cls(what, unit, better, ours, peer_name, peer, ratio, target, quartile)

    def cells(self) -> tuple[str, ...]:
        """The texts of COLUMNS."""
        if self.ours is None:
            missing = ("not measured", self.peer_name, "", "", "", "", self.note)
            return (self.what, self.unit, *missing)
        shown = (self.what, self.unit, text(self.ours), self.peer_name)
        if self.ratio is None or self.peer is None:
            return (*shown, "", "", "", self._aim(), self._reached())
        compared = (text(self.peer), f"{text(self.ratio)}x", quartiles(self.ratio))
        return (*shown, *compared, self._aim(), self._reached())

    def _aim(self) -> str:
        sign = "<=" if self.better == "lower" else ">="
        aims = [f">= {self.target:.3g}x"] if self.target is not None else []
        aims += [f"quartile >= {self.quartile:g}x"] if self.quartile is not None else []
        return ", ".join(aims + ([f"{sign} {self.limit:g}"] if self.limit is not None else []))

    def _reached(self) -> str:
        words = []
        if self.ratio is not None:
            words.append(verdict(self.ratio))
        if self.ratio is not None and self.target is not None:
            words.append(against_targets(self.ratio, self.target, self.quartile))
        if self.limit is not None and self.ours is not None:
            low = self.better == "lower"
            held = self.ours.high <= self.limit if low else self.ours.low >= self.limit
            words.append(f"target {'met' if held else 'missed'}")
        return ", ".join(words + ([self.note] if self.note else []))


@dataclass(frozen=True)
class Figures:
    """Everything that one run of one benchmark found."""

    name: str
    command: str
    quick: bool
    rounds: int
    code: Code
    measured_at: str
    machine: Mapping[str, str]
    ceilings: Mapping[str, float]
    agreement: Mapping[str, float]  # what was compared -> mean difference in levels of 255
    rows: Sequence[Row]
    curve: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    def write(self) -> Path:
        app.BUILD.mkdir(parents=True, exist_ok=True)
        path = app.BUILD / f"{self.name}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, name: str) -> Figures | None:
        """What the last run wrote, if there was one."""
        path = app.BUILD / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        if "code" not in found:
            return None  # or only one by a version of the benchmarks that did not note it
        rows = [_row(row) for row in found["rows"]]
        return cls(**{**found, "rows": rows, "code": Code(**found["code"])})


def _row(found: Mapping[str, Any]) -> Row:
    spreads = {k: Spread(**found[k]) for k in ("ours", "peer", "ratio") if found[k] is not None}
    return Row(**{**found, **spreads})


def publish(
    name: str,
    effort: Effort,
    rows: Sequence[Row],
    ceilings: Mapping[str, float],
    agreement: Mapping[str, float] | None = None,
    curve: Sequence[Mapping[str, Any]] = (),
    device: str = "cpu",
) -> None:
    """Print the table and write the file. Raises if the code has changed while it was measured."""
    code = Tree().code(name)
    if code.digest != effort.tree.code(name).digest:
        raise click.ClickException(f"{name}: the code changed while it was measured")
    others = effort.company.share()
    ceilings = {**ceilings, "taken by other processes, % of the CPU": 100 * others}
    if others > LOUD:
        click.echo(f"warning: others took {others:.0%} of the CPU: measure again alone", err=True)
    command = " ".join(["python -m bench", *sys.argv[1:]])
    at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    around = {**machine(device), "threads": str(effort.threads)}
    found = Figures(
        name, command, effort.quick, effort.rounds, code, at, around, ceilings, agreement or {},
        rows, curve,
    )  # fmt: skip
    show(found)
    click.echo(f"written to {found.write()}", err=True)


def show(figures: Figures) -> None:
    click.echo("\n".join(plain_table([COLUMNS, *[row.cells() for row in figures.rows]])))
    for what, levels in figures.agreement.items():
        click.echo(f"pictures: {what}: {levels:.4f} levels of 255 apart in the mean")
    found = ", ".join(f"{what} {figure:.4g}" for what, figure in figures.ceilings.items())
    click.echo(f"this device in this run: {found}")
    if figures.quick:
        click.echo("quick: these figures say that it runs and nothing else")


def plain_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; columns without any content are left out."""
    columns = [n for n in range(len(rows[0])) if any(row[n] for row in rows[1:])]
    widths = {n: max(len(row[n]) for row in rows) for n in columns}
    return ["  ".join(row[n].ljust(widths[n]) for n in columns).rstrip() for row in rows]


def text(spread: Spread) -> str:
    """`median (low to high)`, three digits."""
    if spread.low == spread.high:
        return number(spread.median)
    return f"{number(spread.median)} ({number(spread.low)} to {number(spread.high)})"


def quartiles(spread: Spread) -> str:
    return "" if spread.low == spread.high else f"{number(spread.lower)} to {number(spread.upper)}"


def number(value: float) -> str:
    if 0 < abs(value) < 0.0005:
        return f"{value:.1e}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def machine(device: str) -> dict[str, str]:
    """What the figures depend on."""
    return {
        "device": device if device != "cpu" else _cpu(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **{name: version(name) for name in ("imaged", "torch", "diffusers", "transformers")},
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
