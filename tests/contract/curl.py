"""curl as a person runs it, and what it printed."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def body(self) -> dict[str, Any]:
        found = json.loads(self.content)
        assert isinstance(found, dict)
        return found


def curl(folder: Path, *args: str) -> Answer:
    """Run `curl ARGS`, with headers and body caught in files."""
    head, body = folder / "head", folder / "body"
    command = ["curl", "-sS", "--noproxy", "*", "--max-time", "30", "-D", str(head)]
    command += ["-o", str(body), *args]
    subprocess.run(command, check=True, timeout=60)
    lines = head.read_text().strip().replace("\r", "").split("\n\n")[-1].splitlines()
    pairs = (line.partition(": ")[::2] for line in lines[1:])
    content = body.read_bytes() if body.exists() else b""
    return Answer(int(lines[0].split()[1]), {k.lower(): v for k, v in pairs}, content)
