"""Writes docs/compatibility.md from rows.toml: `python -m tests.contract.table`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "compatibility.md"
VERDICTS = {
    "same": "as in the original",
    "client": "a client's way: it works",
    "wider": "as in the original, and more",
    "other": "different on purpose",
}
HEAD = """# Compatibility

What is known of the API of Segmind's hosted models, fact by fact, and where imaged stands. Numbers
are names, to find a fact by. **C** is certain, **L** likely, from public documentation and public
clients; nothing was tried against the vendor's servers. Each row is held by the test it names.
Written by `python -m tests.contract.table` from [rows.toml](../tests/contract/rows.toml); a test
keeps the two together.
"""


class Fact(NamedTuple):
    number: str
    mark: str
    says: str
    verdict: str
    test: str


def facts() -> list[Fact]:
    return [Fact(*row) for row in _rows()["fact"]]


def left_out() -> list[tuple[str, str, str]]:
    return [(number, mark, why) for number, mark, why in _rows()["left_out"]]


def document() -> str:
    rows = [
        f"| {f.number} | {f.mark} | {f.says} | {VERDICTS[f.verdict]} | "
        f"[{f.test.split('::')[1]}](../tests/contract/{f.test.split('::')[0]}) |"
        for f in facts()
    ]
    others = [f"| {number} | {mark} | {why} |" for number, mark, why in left_out()]
    table = ["| # | | fact | here | test |", "|---|---|---|---|---|", *rows]
    rest = ["| # | | fact |", "|---|---|---|", *others]
    text = "\n".join([HEAD, *table, "", "## What has no counterpart here", "", *rest])
    return text + "\n"


def _rows() -> dict[str, list[list[str]]]:
    return tomllib.loads((Path(__file__).parent / "rows.toml").read_text())


if __name__ == "__main__":
    DOCUMENT.write_text(document())
