"""Whether the documents' figures are of the code that is here."""

from __future__ import annotations

from collections.abc import Sequence

import click

from bench.all import PARTS
from bench.app import main
from bench.code import ROOT, Tree
from bench.report import DOCUMENTS, Place, places


@main.command()
@click.option("--strict", is_flag=True, help="Fail unless a release may have these figures.")
def check(strict: bool) -> None:
    """Name the figures in the documents that were measured on other code than is here.

    A warning, unless --strict: then every benchmark that `all` runs has to have been measured on
    this code, committed, all on one commit. Figures of `full` and of a GPU only warn. Which files
    count for which benchmark is said in docs/benchmarks.md.
    """
    tree, found = Tree(), []
    for document in DOCUMENTS:
        here = places(document.read_text())
        found += here
        for place in here:
            told = strict and place.name in PARTS  # below
            if place.measured and not told and (stale := tree.stale(place.name, place.code)):
                click.echo(
                    f"warning: {document.relative_to(ROOT)}, {place.name}: {stale}", err=True
                )
    if strict and (faults := refusals(found, tree)):
        raise click.ClickException("\n  ".join(["these figures are not for a release:", *faults]))


def refusals(found: Sequence[Place], tree: Tree) -> list[str]:
    """What a release lacks."""
    by_name = {place.name: place for place in found}
    faults = []
    for name in PARTS:
        place = by_name.get(name, Place(name))
        if not place.measured:
            faults.append(f"{name}: not measured")
        elif stale := tree.stale(name, place.code):
            faults.append(f"{name}: {stale}")
        elif not place.code.commit:
            faults.append(f"{name}: measured on code that was not committed")
    commits = sorted({by_name[n].code.commit for n in PARTS if n in by_name} - {""})
    if len(commits) > 1:
        faults.append(f"measured on different commits: {', '.join(commits)}")
    return [*faults, "`python -m bench all` measures them anew"] if faults else []
