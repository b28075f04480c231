"""The matrix of processors: what it must not do is to test one thing six times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import portable
from tests.portable import Cell, planned, table

OWN = {"own": ("AVX512", "Intel AVX-512")}
Says = Callable[[dict[str, tuple[str, str]]], None]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Says:
    """Libraries that say these things of themselves, on an x86 processor."""

    def set_(said: dict[str, tuple[str, str]]) -> None:
        def probe(cell: Cell) -> None:
            cell.torch, cell.onednn = said[cell.kernels]
            cell.bits = dict.fromkeys(("torch", "oneDNN"), hash(cell.kernels)) | {"MKL": 1}

        monkeypatch.setattr(Cell, "probe", probe)
        monkeypatch.setattr("platform.machine", lambda: "x86_64")

    return set_


def test_libraries_that_do_as_told_make_six_cells(says: Says) -> None:
    says(portable.SAID | OWN)
    cells = planned()
    assert len({cell.name for cell in cells}) == 6 and not any(cell.left_out for cell in cells)
    assert "MKL gave the same bits with AVX2 and SSE4 and own." in table(cells)


@pytest.mark.parametrize("deaf", ["SSE4", "AVX2"])
@pytest.mark.parametrize("library", [0, 1], ids=["torch", "oneDNN"])
def test_a_library_that_does_not_as_told_ends_it(says: Says, deaf: str, library: int) -> None:
    heard = list(portable.SAID[deaf])
    heard[library] = OWN["own"][library]
    says({**portable.SAID, **OWN, deaf: (heard[0], heard[1])})
    with pytest.raises(SystemExit, match="would not test what it says"):
        planned()


def test_what_a_processor_lacks_is_told(says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    says({"SSE4": portable.SAID["SSE4"], "AVX2": ("DEFAULT", "Intel AVX"), "own": ("DEFAULT", "")})
    old = planned()
    assert [cell.name for cell in old if cell.left_out] == ["AVX2-1", "AVX2-2"]
    assert "not run: this processor has no AVX2" in table(old)
    assert "no AVX-512: nothing here says how it is there" in table(old)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert [cell.kernels for cell in planned() if not cell.left_out] == ["own", "own"]


def test_what_is_the_processors_own_is_not_run_twice(
    says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    says({**portable.SAID, "own": portable.SAID["AVX2"]})
    assert not any(cell.left_out for cell in planned()), "the bits of MKL and torch may differ"
    monkeypatch.setattr(Cell, "probe", alike(Cell.probe))
    cells = planned()
    assert [cell.name for cell in cells if cell.left_out] == ["AVX2-1", "AVX2-2"]
    assert "not run: these are this processor's own" in table(cells)


def alike(probe: Callable[[Cell], None]) -> Callable[[Cell], None]:
    """A probe that finds the bits of all kernels alike."""

    def probed(cell: Cell) -> None:
        probe(cell)
        cell.bits = dict.fromkeys(cell.bits, 1)

    return probed


@pytest.mark.slow
def test_a_cell_counts_what_pytest_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "test_x.py"
    file.write_text(
        "import os, pytest\n"
        "def test_told(): assert os.environ['ATEN_CPU_CAPABILITY'] == 'avx2'\n"
        "def test_wrong(): assert os.environ['OMP_NUM_THREADS'] == '2'\n"
        "def test_none(): pytest.skip()\n"
    )
    monkeypatch.setattr(portable, "FILES", (str(file),))
    monkeypatch.setattr(portable, "BUILD", tmp_path)
    cell = Cell("AVX2", 1).run()
    assert (cell.passed, cell.failed, cell.skipped) == (1, 1, 1)
    assert [name.rpartition("::")[2] for name in cell.failures] == ["test_wrong"]
    file.write_text("import nothing_of_that_name\n")
    assert Cell("AVX2", 1).run().failed == 1
