"""A checkpoint of SDXL's full size in both layouts: read right, soon, and in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import safe_open

from bench.app import Effort, effort_options, main
from bench.ceiling import ceilings
from bench.code import ROOT
from bench.figures import Row, publish
from bench.rounds import Spread, compare
from bench.sides import original_layout
from bench.sides.models import checkpoint

CHUNK = 1 << 22
CLOSE = 1e-4  # of the largest output, float32
READ_SHARE = 1 / 1.5  # of the speed of reading the file that loading should have
ROOM = 1.3  # times the weights that loading may need


@main.command()
@click.option("--small", is_flag=True, help="With a reduced checkpoint; proves little.")
@effort_options()
def full(small: bool, effort: Effort) -> None:
    """SDXL at full size with random weights, in both layouts, on the CPU in float32.

    Makes a diffusers folder and a file in the original layout (7 GB each, float16, kept in
    build/bench) and says of them: whether every tensor arrives, how far both text encoders, one
    UNet call at 512 px and one VAE decode are from the reference library, how long loading takes
    beside reading the file, both from the disk itself, and how much memory. Needs 24 GB of memory
    and 16 GB of disk.
    """
    name = "reduced" if small else "full"
    folder = checkpoint(name)
    single = single_file(folder, name)
    found = ceilings(torch.device("cpu"))
    found["GB of weights in the file"] = single.stat().st_size / 1e9
    found["filling memory that was never used, GB/s"] = fresh_memory() / 1e9
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        theirs = _side("theirs", folder, out / "theirs", effort)
        rows = [
            row for layout in (single, folder) for row in _agreement(layout, folder, out, effort)
        ]
    loads: list[dict[str, Any]] = []

    def load(_: int) -> float:
        forget(single)
        loads.append(_side("load", single, single, effort))
        return float(loads[-1]["seconds"])

    def read(_: int) -> float:
        forget(single)
        return reading(single)

    pair = compare(load, read, effort.rounds, "load")
    row = Row.of("load the file", "s", "lower", "reading it", pair, READ_SHARE)
    memory = Spread.of(run["peak"] / run["weights"] for run in loads)
    rows += [row, Row("memory to load, in weights", "", "lower", memory, limit=ROOM)]
    rows += [Row(f"the reference's {k}", "s", "lower", Spread.of([v])) for k, v in theirs.items()]
    publish("full", effort, rows, found)


def single_file(folder: Path, name: str) -> Path:
    """The folder's weights as one file in the original layout, made at first use."""
    path = folder.parent / f"{name}.safetensors"
    if not path.exists():
        click.echo(f"writing {path.name}", err=True)
        part = path.with_suffix(".part")
        original_layout.write(part, library_nets(folder))
        part.rename(path)
    return path


def library_nets(folder: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The reference libraries' nets of a folder, in the type they were written in or another."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    classes = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    dtype = dtype or _written(folder / "vae" / "diffusion_pytorch_model.safetensors")
    nets = {
        part: kind.from_pretrained(folder / part, dtype=dtype, local_files_only=True)
        for part, kind in classes.items()
    }
    return {part: net.eval() for part, net in nets.items()}


def _written(path: Path) -> torch.dtype:
    """The type of a file's first tensor."""
    with safe_open(path, framework="pt") as file:
        dtype: torch.dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return dtype


def _agreement(layout: Path, folder: Path, out: Path, effort: Effort) -> list[Row]:
    """How far our outputs and tensors are from the reference's, which are in `out`/theirs."""
    found = _side("ours", layout, out / "ours", effort, str(folder), str(out / "theirs"))
    kind = "folder" if layout.is_dir() else "file"
    rows = [
        Row(f"{kind}: {what}, apart", "", "lower", Spread.of([apart]), limit=CLOSE)
        for what, apart in found["apart"].items()
    ]
    unequal = Row(f"{kind}: tensors that differ", f"of {found['tensors']}", "lower", limit=0.0)
    return [replace(unequal, ours=Spread.of([found["unequal"]])), *rows]


def _side(side: str, layout: Path, out: Path, effort: Effort, *given: str) -> dict[str, Any]:
    """Run one side in a process of its own, which has its memory to itself."""
    command = [sys.executable, "-m", "bench.full.side", side, str(layout), str(out), *given]
    threads = {"OMP_NUM_THREADS": str(effort.threads)}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        check=True,
        timeout=1800,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def fresh_memory(size: int = 1 << 32) -> float:
    """Bytes/s at which the system hands out memory: every loaded weight has to be given some."""
    started = time.perf_counter()
    torch.empty(size, dtype=torch.uint8).fill_(1)
    return size / (time.perf_counter() - started)


def forget(path: Path) -> None:
    """Have the system forget the file's pages: it will be read from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading(path: Path) -> float:
    """Seconds to read the file once."""
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(CHUNK):
            pass
    return time.perf_counter() - started
