"""Setting up: which Python `make` takes, and what is in the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from PIL import Image

from tests.conftest import Server, free_port

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "imaged")
#: Counts by the calendar: no version of it is announced as one that may break something.
WITHOUT_END = {"regex"}


def make(folder: Path, before: str, *goals: str) -> subprocess.CompletedProcess[str]:
    """`make` with a Python that is this one after a line of code, and can do no more than tell."""
    python = folder / "python"
    python.write_text(
        f"#!/bin/sh\n"
        f'[ "$1" = -c ] && exec "{sys.executable}" -c "{before}\n$2"\n'
        f'touch "{folder}/begun"; exit 3\n'
    )
    python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return subprocess.run(
        ["make", f"PYTHON={python}", *goals],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (
            "import sys; sys.version_info = (3, 9, 2, 'final', 0)",
            "is Python 3.9. imaged needs Python 3.11 or newer. If there is one: "
            "make serve PYTHON=python3.12",
        ),
        (
            "import sys; sys.version_info = (2, 7, 18, 'final', 0)",
            "is Python 2.7. imaged needs Python 3.11 or newer. If there is one: "
            "make serve PYTHON=python3.12",
        ),
        *(
            (
                f"import sys; sys.modules['{missing}'] = None",
                "cannot make environments: it has no venv or no ensurepip. On Debian and Ubuntu: "
                f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv",
            )
            for missing in ("ensurepip", "venv")
        ),
    ],
    ids=["3.9", "2.7", "no ensurepip", "no venv"],
)
def test_make_refuses_a_python_that_will_not_do(before: str, said: str, tmp_path: Path) -> None:
    done = make(tmp_path, before, "serve")
    line, last = done.stderr.splitlines()
    assert line == f"{tmp_path / 'python'} {said}"
    assert last.startswith("make: ***") and done.stdout == ""
    assert not (tmp_path / "begun").exists() and not (tmp_path / ".venv").exists()


def test_make_goes_on_with_one_that_will(tmp_path: Path) -> None:
    assert "Setting up .venv" in make(tmp_path, "pass").stdout and (tmp_path / "begun").exists()


def test_make_says_that_there_is_no_such_python(tmp_path: Path) -> None:
    done = make(tmp_path, "pass", "demo", "PYTHON=python9.99")
    assert done.stderr.startswith("python9.99 was not found. imaged needs Python 3.11 or newer.")


# -- the wheel --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what an earlier build has left in a tree gets into later ones."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            leave = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=leave)
        else:
            shutil.copy(source, folder)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")  # nothing is fetched
    pip = [sys.executable, "-m", "pip", "wheel", ".", *options, "--wheel-dir", "made"]
    done = subprocess.run(pip, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [made] = (folder / "made").iterdir()
    return made


def test_the_wheel_is_the_package_and_nothing_else(wheel: Path) -> None:
    package = [p for p in (ROOT / "imaged").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    with zipfile.ZipFile(wheel) as opened:
        packed = {name for name in opened.namelist() if ".dist-info/" not in name}
        licences = [name for name in opened.namelist() if "/licenses/" in name]
    assert packed == {str(path.relative_to(ROOT)) for path in package}
    assert {name.rpartition("/")[2] for name in licences} == {"LICENSE", "NOTICE"}


def test_the_wheel_says_with_which_versions_it_runs(wheel: Path) -> None:
    """At least one that is tested, and none that may break what it builds on."""
    with zipfile.ZipFile(wheel) as opened:
        [path] = [name for name in opened.namelist() if name.endswith("/METADATA")]
        metadata = HeaderParser().parsestr(opened.read(path).decode())
    assert metadata["Requires-Python"] == ">=3.11"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().split("==") for line in lines if "==" in line)
    needs = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    needs = [need for need in needs if need.marker is None]  # others are for developers
    assert len(needs) > 15
    for need in needs:
        assert need.specifier.contains(pinned[need.name.lower()]), need
        operators = {bound.operator for bound in need.specifier}
        assert operators == ({">="} if need.name in WITHOUT_END else {">=", "<"}), need
    [uvicorn] = [need for need in needs if need.name == "uvicorn"]
    minor = int(pinned["uvicorn"].split(".")[1])
    assert not uvicorn.specifier.contains(f"0.{minor + 1}.0"), (
        "gateway/transport/protocol.py extends its insides"
    )


@pytest.mark.slow
def test_the_wheel_serves_by_itself(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which finds this one's libraries but not this tree."""
    python = environment(tmp_path / "env")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--quiet", str(wheel)], check=True)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = "import imaged; print(imaged.__file__)"
    found = subprocess.run(
        [str(python), "-c", where], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert found.stdout.startswith(str(tmp_path / "env")), found
    server, port = Server(tmp_path / "data"), free_port()
    server.port = port
    with (tmp_path / "data.log").open("ab") as log:
        server.process = subprocess.Popen(
            [python.with_name("imaged"), "serve", "--port", str(port)],
            cwd=tmp_path,
            env=environ,
            stdout=log,
            stderr=log,
        )
    try:
        server.wait_until("readyz")
        body = {"prompt": "a red house", "img_width": 256, "img_height": 256, "base64": False}
        with server.client() as client:
            answer = client.post("/v1/sdxl-lightning", json=body)
        (tmp_path / "house.jpg").write_bytes(answer.content)
        with Image.open(tmp_path / "house.jpg") as image:
            assert image.size == (256, 256)
        assert httpx.get(f"{server.url}/docs").is_success
    finally:
        server.stop()


def environment(folder: Path) -> Path:
    """A new environment's Python, which looks for libraries where this one has them."""
    made = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(made, check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "theirs.pth").write_text("\n".join(ours) + "\n")
    return folder / "bin" / "python"


def test_the_versions_of_the_project_and_the_package_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [version] = re.findall(
        r'^__version__ = "(.*)"$', (ROOT / "imaged/__init__.py").read_text(), re.M
    )
    assert project["version"] == version
