"""One team of threads computes in a worker, and one only (decision 17): a property, not a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from imaged.catalogue.model import MICRO
from tests.engine.team import MUTANTS, THREADS
from tests.golden.test_lora import attention, halves, kohya

ROOT = Path(__file__).parents[2]


def threads(folder: Path, nets: Any, mutant: str = "") -> dict[str, int]:
    """How many threads a worker of its own has after each part of its life."""
    (folder / "loras").mkdir()
    save_file(kohya(halves(attention(nets), 1)), folder / "loras" / "ink.safetensors")
    shutil.copytree(MICRO, folder / "other")
    (folder / "data").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.team", str(folder), *([mutant] if mutant else [])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_one_team_computes_whatever_the_worker_does(tmp_path: Path, nets: Any) -> None:
    counts = threads(tmp_path, nets)
    before = counts.pop("before")
    assert len(counts) == 6
    assert {part: count - before for part, count in counts.items()} == dict.fromkeys(
        counts, THREADS - 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_thread_that_stays_would_be_seen(tmp_path: Path, nets: Any, mutant: str) -> None:
    counts = threads(tmp_path, nets, mutant)
    before = counts.pop("before")
    assert max(counts.values()) - before > THREADS - 1
