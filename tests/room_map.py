"""Draws docs/map.md from the imports: `python -m tests.room_map`.

Arrows that follow from others are left out: where a imports b and c, and b imports c, a -> b and
b -> c are drawn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tests.test_architecture import PACKAGE, PARTS, ROOMS, ROOT, imports

DOCUMENT = ROOT / "docs" / "map.md"
PLACE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Arrows = Mapping[str, set[str]]


def drawn(folder: Path, names: Mapping[str, object]) -> Arrows:
    """name -> the other names that its files import; each is a file or a folder."""
    prefix = folder.relative_to(ROOT).as_posix().replace("/", ".") + "."
    found = {}
    for name in names:
        files = [folder / f"{name}.py", *(folder / name).rglob("*.py")]
        there = [one for file in files if file.exists() for one in imports(file.read_text())]
        rooms = {t.removeprefix(prefix).split(".")[0] for t in there if t.startswith(prefix)}
        found[name] = (rooms & set(names)) - {name}
    return found


def reduced(arrows: Arrows) -> Arrows:
    """Without the arrows that follow from others; there is no circle (test_architecture.py)."""

    def reached(name: str) -> set[str]:
        return arrows[name].union(*(reached(other) for other in arrows[name]))

    return {
        name: others - set[str]().union(*(reached(other) for other in others))
        for name, others in arrows.items()
    }


def mermaid(arrows: Arrows) -> str:
    lines = [f"  {name} --> {other}" for name in arrows for other in sorted(arrows[name])]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```"])


def document(text: str) -> str:
    """The document with its drawings as the imports are now."""

    def one(place: re.Match[str]) -> str:
        part = place[2]
        folder, names = (PACKAGE, PARTS) if part == "imaged" else (PACKAGE / part, ROOMS[part])
        return f"{place[1]}{mermaid(reduced(drawn(folder, names)))}\n{place[3]}"

    return PLACE.sub(one, text)


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
