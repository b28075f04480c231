"""The tests that compare numbers, under other processors' instructions, with one thread and two.

torch and its libraries take their kernels from what the processor can do, and sum in other orders
with other kernels. Told to do without the newer instructions, they compute as on a processor that
lacks them; what they then say of themselves is compared with what they were told. Writes
build/portable.json and the table in docs/benchmarks.md:

    python -m tests.portable                 # or make portable
    python -m tests.portable --only AVX2-1   # one cell, whose figures stay out of the document
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import click

from bench.figures import machine
from bench.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "portable"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
PLACE = re.compile(r"(<!-- portable -->\n).*?(<!-- end -->)", re.DOTALL)
ENGINES = ("engine", "snapshots", "checkpoint_cache", "samplers", "training")
FILES = ("tests/golden", *(f"tests/engine/test_{name}.py" for name in ENGINES))
LEFT_OUT = "the slow tests of these files, which are larger ones of the same kinds"
THREADS = (1, 2)
#: What the libraries are told, and what torch and oneDNN then have to say of themselves.
TOLD = {
    "SSE4": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "own": {},
}
SAID = {"SSE4": ("DEFAULT", "Intel SSE4.1"), "AVX2": ("AVX2", "Intel AVX2")}
STEERING = {name for told in TOLD.values() for name in told} | {"PYTEST_ADDOPTS", "MKL_CBWR"}
POLL_S = 60.0
PROBE = """
import json, zlib, torch
from torch.nn.functional import conv2d
draw = torch.Generator().manual_seed(0)
a, b = torch.randn(200, 700, generator=draw), torch.randn(700, 300, generator=draw)
x, w = torch.randn(2, 64, 16, 16, generator=draw), torch.randn(64, 64, 3, 3, generator=draw)
made = {"torch": a.softmax(0), "oneDNN": conv2d(x, w, padding=1), "MKL": a @ b}
bits = {name: zlib.crc32(value.contiguous().numpy().tobytes()) for name, value in made.items()}
says = torch.backends.cpu.get_cpu_capability()
print(json.dumps({"torch": says, "threads": torch.get_num_threads(), "bits": bits}))
"""


@dataclass
class Cell:
    """One run of the tests, and what came of it."""

    kernels: str
    threads: int
    torch: str = ""
    onednn: str = ""
    bits: dict[str, int] = field(default_factory=dict)
    left_out: str = ""  # why it was not run
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.kernels}-{self.threads}"

    @property
    def environ(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in STEERING}
        threads = {f"{library}_NUM_THREADS": str(self.threads) for library in ("OMP", "MKL")}
        return {**kept, **TOLD[self.kernels], **threads}

    def probe(self) -> None:
        """What the libraries say of themselves, told what they are told."""
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            env={**self.environ, "ONEDNN_VERBOSE": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        said = json.loads(done.stdout.splitlines()[-1])
        if said["threads"] != self.threads:
            raise SystemExit(f"{self.name}: torch computes with {said['threads']} threads")
        isa = re.search(r"info,cpu,isa:(.*)", done.stdout)
        self.torch, self.bits = said["torch"], said["bits"]
        self.onednn = isa[1] if isa else "not built in"

    def run(self) -> Cell:
        """All files in a process of their own; its words go into build/portable/NAME.log."""
        BUILD.mkdir(parents=True, exist_ok=True)
        results, log = BUILD / f"{self.name}.xml", BUILD / f"{self.name}.log"
        results.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=20"]
        command += ["-m", "not slow"]
        began = time.monotonic()
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, f"--junitxml={results}", *FILES],
                env=self.environ,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            click.echo(f"{self.name}: begun; {self.torch}, {self.onednn}")
            while process.poll() is None:
                self._wait(process, log)
        self.seconds = time.monotonic() - began
        self._count(results)
        if process.returncode and not self.failed:
            self.failed, self.failures = 1, [f"pytest ended with {process.returncode}, see {log}"]
        click.echo(f"{self.name}: {self.passed} passed, {self.failed} failed, {self.seconds:.0f} s")
        return self

    def _wait(self, process: subprocess.Popen[bytes], log: Path) -> None:
        try:
            process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            shares = re.findall(r"\[ *(\d+)%\]", log.read_text(errors="replace"))
            click.echo(f"{self.name}: {shares[-1] if shares else 0} %")

    def _count(self, results: Path) -> None:
        if not results.exists():
            return
        for case in ElementTree.parse(results).iter("testcase"):
            kinds = {child.tag for child in case}
            if kinds & {"failure", "error"}:
                self.failed += 1
                self.failures.append(f"{case.get('classname')}::{case.get('name')}")
            elif "skipped" in kinds:
                self.skipped += 1
            else:
                self.passed += 1

    def row(self) -> list[str]:
        shown = [self.kernels, str(self.threads), self.torch, self.onednn]
        if self.left_out:
            return [*shown, f"*not run: {self.left_out}*", "", "", ""]
        counts = [str(n) for n in (self.passed, self.failed, self.skipped)]
        return [*shown, *counts, f"{self.seconds / 60:.1f}"]


COLUMNS = ["kernels", "threads", "torch says", "oneDNN says", "passed", "failed", "skipped", "min"]


def _superfluous(cell: Cell, own: Cell) -> str:
    """Why this cell need not or cannot be run on this processor, "" if it has to be."""
    if cell.kernels == "AVX2" and own.torch == "DEFAULT":
        return "this processor has no AVX2"
    if (cell.torch, cell.onednn) != SAID[cell.kernels]:
        raise SystemExit(
            f"{cell.name}: told {TOLD[cell.kernels]}, torch says {cell.torch} and oneDNN"
            f" {cell.onednn}: this cell would not test what it says"
        )
    if (cell.torch, cell.onednn, cell.bits) == (own.torch, own.onednn, own.bits):
        return "these are this processor's own, see there"
    return ""


def planned() -> list[Cell]:
    """All cells, those left out among them: which kernels there are is asked of this processor."""
    cells = [Cell(kernels, threads) for threads in THREADS for kernels in TOLD]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    for cell in cells:
        if not x86 and cell.kernels != "own":
            cell.left_out = f"this processor is {platform.machine()}"
        else:
            cell.probe()
    for own in [cell for cell in cells if cell.kernels == "own"]:
        for cell in cells:
            if cell.threads == own.threads and cell is not own and not cell.left_out:
                cell.left_out = _superfluous(cell, own)
    return cells


def run_all(cells: list[Cell]) -> None:
    """Of one number of threads at a time, as many cells at once as there are cores for."""
    for threads in THREADS:
        chosen = [cell for cell in cells if cell.threads == threads and not cell.left_out]
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // threads)) as at_once:
            list(at_once.map(Cell.run, chosen))


def remarks(cells: list[Cell]) -> Iterator[str]:
    """What the table alone would hide."""
    yield f"Left out: {LEFT_OUT}."
    ran = [cell for cell in cells if not cell.left_out]
    if (os.cpu_count() or 1) < max(THREADS):
        yield "There is one core only: two threads took turns on it."
    if all(cell.torch != "AVX512" for cell in ran):
        yield "This processor has no AVX-512: nothing here says how it is there."
    for library in ("torch", "oneDNN", "MKL"):
        alike: dict[int, set[str]] = {}
        for cell in ran:
            alike.setdefault(cell.bits[library], set()).add(cell.kernels)
        for names in alike.values():
            if len(names) > 1:
                yield f"{library} gave the same bits with {' and '.join(sorted(names))}."


def table(cells: list[Cell]) -> str:
    where = ", ".join(f"{name} {value}" for name, value in machine("cpu").items())
    lines = markdown_table([COLUMNS, *[cell.row() for cell in cells]])
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    lines += ["", f"`make portable`, {when}; {where}."]
    if said := list(remarks(cells)):
        lines += ["", *said]
    return "\n".join(lines)


@click.command()
@click.option("--only", multiple=True, metavar="CELL", help="Such as SSE4-1, AVX2-2 or own-1.")
def main(only: tuple[str, ...]) -> None:
    """The tests that compare numbers, under other processors' instructions."""
    cells = planned()
    names = {cell.name for cell in cells}
    if wrong := set(only) - names:
        raise click.BadParameter(f"{', '.join(wrong)} is none of {', '.join(sorted(names))}")
    cells = [cell for cell in cells if not only or cell.name in only]
    click.echo(f"!!! NOT run: {LEFT_OUT}")
    for cell in cells:
        if cell.left_out:
            click.echo(f"!!! {cell.name} is NOT run: {cell.left_out}")
    run_all(cells)
    text = table(cells)
    if not only:
        (BUILD.parent / "portable.json").write_text(
            json.dumps([asdict(cell) for cell in cells], indent=1) + "\n"
        )
        page = DOCUMENT.read_text()
        DOCUMENT.write_text(PLACE.sub(lambda m: f"{m[1]}{text}\n{m[2]}", page))
    click.echo(text)
    failures = [f"{cell.name}: {name}" for cell in cells for name in cell.failures]
    click.echo("\n".join(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
