"""The figures of the last runs into the documents, and the plot."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from bench.app import ROOT, main
from bench.figures import COLUMNS, Figures

DOCUMENTS = [ROOT / "docs" / name for name in ("benchmarks.md", "checkpoints.md")]
PLOT = Path("pictures") / "load.png"  # beside the documents
NOT_MEASURED = "*Not measured.*"
LEAST_ROUNDS = 5  # as the document promises
PLACE = re.compile(r"(<!-- figures: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@main.command()
def report() -> None:
    """Write the figures in build/bench into the documents and draw their plot.

    Only the places between the marks are touched. What was not measured, or with --quick or fewer
    than five rounds only, is said to be not measured.
    """
    for document in DOCUMENTS:
        text = document.read_text()
        names = [match[1] for match in PLACE.findall(text)]
        found = {name: figures for name in names if (figures := Figures.read(name)) is not None}
        document.write_text(fill(text, found, document.parent))
        measured = sorted(name for name, figures in found.items() if counts(figures))
        click.echo(f"{document.relative_to(ROOT)}: {', '.join(measured) or 'nothing measured'}")


def fill(text: str, found: Mapping[str, Figures], folder: Path) -> str:
    """The document with every place filled anew; the plot goes into `folder`/pictures."""

    def place(match: re.Match[str]) -> str:
        figures = found.get(match[2])
        if figures is None or not counts(figures):
            return f"{match[1]}{NOT_MEASURED}\n{match[3]}"
        body = section(figures)
        if figures.curve:
            draw(figures.curve, folder / PLOT)
            body += f"\n\n![Pictures a second and p95 against load]({PLOT})"
        return f"{match[1]}{body}\n{match[3]}"

    return PLACE.sub(place, text)


def counts(figures: Figures) -> bool:
    """Whether these figures may enter the document."""
    return not figures.quick and figures.rounds >= LEAST_ROUNDS


def section(figures: Figures) -> str:
    """One benchmark: its table, and under it what it was measured on."""
    where = ", ".join(f"{name} {value}" for name, value in figures.machine.items())
    limits = ", ".join(f"{name}: {value:.4g}" for name, value in figures.ceilings.items())
    lines = markdown_table([COLUMNS, *[row.cells() for row in figures.rows]])
    lines += ["", f"`{figures.command}`, {figures.rounds} rounds, {figures.measured_at}; {where}."]
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
