"""What a caller's type checker knows of the package."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import imaged

ROOT = Path(__file__).parents[2]
CALLER = """\
import imaged
reveal_type(imaged.run("slug", prompt="x"))
reveal_type(imaged.Client().submit_async("slug").events())
reveal_type(imaged.AsyncClient)
reveal_type(imaged.models.list)
imaged.nothing
"""


@pytest.mark.slow
def test_the_clients_names_have_types(tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text(CALLER)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "caller.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = [line.split(": ", 2)[2] for line in done.stdout.splitlines()[:-1]]
    assert said == [
        'Revealed type is "imaged.client.result.Result"',
        'Revealed type is "typing.Iterator[imaged.client.events.Event]"',
        said[2],
        'Revealed type is "def () -> dict[str, Any]"',
        'Module has no attribute "nothing"  [attr-defined]',
    ]
    assert said[2].endswith('-> imaged.client.aio.AsyncClient"')


def test_the_marker_is_in_the_package() -> None:
    assert (Path(imaged.__file__).parent / "py.typed").exists()
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert "py.typed" in tools["setuptools"]["package-data"]["imaged"]


def test_what_is_named_is_there() -> None:
    for name in set(imaged.__all__) - set(imaged._GROUPS):
        assert getattr(imaged, name) is not None
    assert not hasattr(imaged, "nothing")
