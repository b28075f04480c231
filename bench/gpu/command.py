"""SDXL of full size with random weights on one GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from bench.app import Effort, diffusers_option, effort_options, main
from bench.ceiling import ceilings, fastest
from bench.figures import Row, publish
from bench.gpu import jobs, steps
from bench.gpu.sides import Bench
from bench.rounds import Spread
from bench.sides.models import checkpoint

Section = Callable[[Bench, Effort], list[Row]]


@dataclass(frozen=True)
class Part:
    """One section of the benchmark: a number, what it says, and who measures it."""

    number: int
    title: str
    measure: Section


@main.command()
@click.option("--small", is_flag=True, help="The same code with `thin` on the CPU; proves nothing.")
@click.option(
    "--only",
    multiple=True,
    type=click.IntRange(0, 7),
    help="Section to run (0 to 7); may be given more than once  [default: all]",
)
@diffusers_option
@effort_options()
def gpu(small: bool, only: tuple[int, ...], diffusers: Path | None, effort: Effort) -> None:
    """Full-size SDXL with random weights on one CUDA GPU, section by section.

    \b
    0 what the GPU can do          4 HTTP request to JPEG, 30 steps
    1 one CFG step at 1024 px      5 random arrivals under four rules
      (and what it attains)        6 steps a second by size and batch
    3 pictures a second, 20 steps  7 VAE decode
    (2 belongs to 1.)

    Peers: the diffusers pipeline as it is, and on a GPU with channels-last, fused QKV and regional
    compilation. Weights are drawn on the device at first use (7 GB in build/bench).
    Without a GPU nothing is measured.
    """
    if not small and not torch.cuda.is_available():
        click.echo("no GPU here: not measured")
        return
    if small:
        effort = replace(effort, rounds=1, seconds=0.0, quick=True)
        torch.set_num_threads(effort.threads)
    device = "cpu" if small else "cuda"
    bench = Bench.load(checkpoint("thin" if small else "full", device), device, diffusers)
    failed = [part.title for part in chosen(only) if not run(part, bench, effort)]
    if failed:
        raise click.ClickException(f"not measured: {', '.join(failed)}")


def chosen(only: tuple[int, ...]) -> list[Part]:
    wanted = {1 if number == 2 else number for number in only}
    return [part for part in PARTS if not wanted or part.number in wanted]


def run(part: Part, bench: Bench, effort: Effort) -> bool:
    """Measure one section with its own ceilings; a section that fails leaves the others alone."""
    click.echo(f"\n{part.number} {part.title}", err=True)
    bench.ceilings = ceilings(bench.device, bench.dtype)
    bench.agreed = {}
    try:
        rows = part.measure(bench, effort)
    except Exception as error:
        if effort.quick:
            raise
        click.echo(f"failed: {type(error).__name__}: {str(error)[:500]}", err=True)
        return False
    name = torch.cuda.get_device_name() if bench.cuda else "cpu"
    publish(f"gpu-{part.number}", effort, rows, bench.ceilings, bench.agreed, device=name)
    return True


def limits(bench: Bench, effort: Effort) -> list[Row]:
    """Matrix products of lower precision and attention, at the sizes of SDXL's two levels."""
    rows = []
    for heads, tokens in bench.pick([(20, 1024), (10, 4096)], [(2, 64)]):
        shape = (2, heads, tokens, 64)
        q, k, v = (torch.randn(shape, device=bench.device, dtype=bench.dtype) for _ in range(3))
        flops = 4 * 2 * heads * tokens**2 * 64
        for name, backend in _backends(bench.device):
            with torch.nn.attention.sdpa_kernel(backend):
                taken = fastest(partial(_attend, q, k, v), bench.device)
            figure = Spread.of([flops / taken / 1e12])
            what = f"attention, {heads} heads, {tokens} tokens, {name}"
            rows.append(Row(what, "TFLOP/s", "higher", figure))
    return rows + ([_fp8(bench.device)] if bench.cuda else [])


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _backends(device: torch.device) -> list[tuple[str, Any]]:
    from torch.nn.attention import SDPBackend

    if device.type == "cpu":
        return [("math", SDPBackend.MATH)]
    return [("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)]


def _fp8(device: torch.device) -> Row:
    side = 8192
    what = f"fp8 matmul of {side}"
    try:
        a = torch.randn(side, side, device=device).to(torch.float8_e4m3fn)
        b = torch.randn(side, side, device=device).to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        multiply: Any = torch._scaled_mm  # the only way to it, so far
        taken = fastest(
            lambda: multiply(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16), device
        )
    except RuntimeError:
        return Row(what, note="this GPU has none")
    return Row(what, "TFLOP/s", "higher", Spread.of([2 * side**3 / taken / 1e12]))


PARTS = (
    Part(0, "what the device can do", limits),
    Part(1, "one CFG step", steps.one_step),
    Part(3, "pictures a second", jobs.offline),
    Part(4, "HTTP to JPEG", jobs.over_http),
    Part(5, "random arrivals", jobs.arrivals),
    Part(6, "by size and batch", steps.by_batch),
    Part(7, "VAE decode", steps.vae_decode),
)
