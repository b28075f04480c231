"""The figures of the last runs into the documents, and the plot."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bench.app import main
from bench.code import ROOT, Code, Tree
from bench.figures import COLUMNS, Figures

DOCUMENTS = [ROOT / "docs" / name for name in ("benchmarks.md", "checkpoints.md")]
PLOT = Path("pictures") / "load.png"  # beside the documents
NOT_MEASURED = "*Not measured.*"
LEAST_ROUNDS = 5  # as the document promises
LEAST_FOR_QUARTILES = 9
PLACE = re.compile(r"<!-- figures: ([a-z0-9-]+)((?: \w+=\w+)*) -->\n(.*?)<!-- end -->", re.DOTALL)
NOTE = re.compile(r"\*Measured on [^\n]*\*\n\n")  # what `fill` puts above figures of other code


@dataclass(frozen=True)
class Place:
    """What stands between two marks of a document, and which code its figures are of."""

    name: str
    body: str = ""
    code: Code = Code()

    @classmethod
    def of(cls, match: re.Match[str]) -> Place:
        name, noted, body = match.groups()
        known = dict(word.split("=") for word in noted.split())
        code = Code(known.get("code", ""), known.get("commit", ""))
        return cls(name, NOTE.sub("", body).strip(), code)

    @property
    def measured(self) -> bool:
        return self.body not in ("", NOT_MEASURED)

    def text(self, tree: Tree) -> str:
        """With its marks; a note above figures of other code than the tree's."""
        stale = tree.stale(self.name, self.code) if self.measured else ""
        note = f"*{stale[0].upper()}{stale[1:]}.*\n\n" if stale else ""
        noted = f" code={self.code.digest}" if self.code.digest else ""
        noted += f" commit={self.code.commit}" if self.code.commit else ""
        body = self.body or NOT_MEASURED
        return f"<!-- figures: {self.name}{noted} -->\n{note}{body}\n<!-- end -->"


def places(text: str) -> list[Place]:
    """Of one document."""
    return [Place.of(match) for match in PLACE.finditer(text)]


@main.command()
def report() -> None:
    """Write the figures in build/bench into the documents and draw their plot.

    Only the places between the marks are touched. A place without new figures keeps what it has:
    figures with --quick, of too few rounds, or of older code than it has, are none. Each notes the
    code that it was measured on; where that has changed since, it says so.
    """
    tree = Tree()
    for document in DOCUMENTS:
        text = document.read_text()
        names = [place.name for place in places(text)]
        found = {name: figures for name in names if (figures := Figures.read(name)) is not None}
        document.write_text(fill(text, found, document.parent, tree))
        measured = sorted(name for name, figures in found.items() if counts(figures))
        click.echo(f"{document.relative_to(ROOT)}: {', '.join(measured) or 'no new figures'}")


def fill(text: str, found: Mapping[str, Figures], folder: Path, tree: Tree) -> str:
    """The document with every place filled anew; the plot goes into `folder`/pictures."""

    def place(match: re.Match[str]) -> str:
        held = Place.of(match)
        figures = found.get(held.name)
        if figures is None or not counts(figures) or _worse(figures.code, held, tree):
            return held.text(tree)
        body = section(figures)
        if figures.curve:
            draw(figures.curve, folder / PLOT)
            body += f"\n\n![Pictures a second and p95 against load]({PLOT})"
        return Place(held.name, body, figures.code).text(tree)

    return PLACE.sub(place, text)


def _worse(code: Code, held: Place, tree: Tree) -> bool:
    """Whether figures of this code are of other code than the tree's, and the held ones are not."""
    current = held.measured and not tree.stale(held.name, held.code)
    return current and bool(tree.stale(held.name, code))


def counts(figures: Figures) -> bool:
    """Whether these figures may enter the document."""
    exacting = any(row.quartile is not None for row in figures.rows)
    least = LEAST_FOR_QUARTILES if exacting else LEAST_ROUNDS
    return not figures.quick and figures.rounds >= least


def section(figures: Figures) -> str:
    """One benchmark: its table, and under it what it was measured on."""
    where = ", ".join(f"{name} {value}" for name, value in figures.machine.items())
    limits = ", ".join(f"{name}: {value:.4g}" for name, value in figures.ceilings.items())
    lines = markdown_table([COLUMNS, *[row.cells() for row in figures.rows]])
    lines += ["", f"`{figures.command}`, {figures.rounds} rounds, {figures.measured_at}; {where}; "]
    lines[-1] += f"code {figures.code}."
    if limits:
        lines += ["", f"In the same run: {limits}."]
    if figures.agreement:
        apart = ", ".join(f"{what} {value:.4f}" for what, value in figures.agreement.items())
        lines += ["", f"Pictures apart, in levels of 255: {apart}."]
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Without the columns that say nothing."""
    columns = [n for n in range(len(rows[0])) if any(row[n] for row in rows[1:])]
    lines = ["| " + " | ".join(row[n] for n in columns) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(columns), *lines[1:]]


def draw(curve: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Throughput and p95 against load, one line for each side of each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rates, waits = figure.subplots(1, 2)
    for model, who in sorted({(point["model"], point["who"]) for point in curve}):
        points = [p for p in curve if (p["model"], p["who"]) == (model, who)]
        loads = [100 * point["load"] for point in points]
        label, style = f"{model}, {who}", "-" if who == "imaged" else "--"
        rates.plot(loads, [p["rate"] for p in points], style, marker="o", label=label)
        for key, mark in (("short_p95", "o"), ("p95", "x")):
            kind = f"{label}, {'short jobs' if key == 'short_p95' else 'all'}"
            waits.plot(loads, [p[key] for p in points], style, marker=mark, label=kind)
    waits.set_yscale("log")
    for axes, title in ((rates, "pictures a second"), (waits, "p95 from arrival to picture, s")):
        axes.set_title(title)
        axes.set_xlabel("load, % of imaged's own capacity")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
