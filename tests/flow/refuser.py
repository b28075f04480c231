"""An image checker for tests: it sees every picture and allows none."""

from __future__ import annotations


def refuse(rgb: bytes, width: int, height: int) -> str:
    assert len(rgb) == 3 * width * height
    return "nobody may see this"
