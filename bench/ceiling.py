"""What the device can do at most, measured in the same run as everything else."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

MATMUL_CPU, MATMUL_CUDA = 1024, 8192  # side of the square matrices
COPY_CPU, COPY_CUDA = 64 << 20, 2 << 30  # bytes


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Seconds of the fastest of some calls, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return min(times)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product."""
    side = MATMUL_CUDA if device.type == "cuda" else MATMUL_CPU
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    return float(2 * side**3 / fastest(lambda: a @ b, device))


def copy_bytes(device: torch.device) -> float:
    """Bytes/s read and written by one large copy."""
    size = COPY_CUDA if device.type == "cuda" else COPY_CPU
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return float(2 * size / fastest(lambda: target.copy_(source), device))


def ceilings(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Name with unit -> figure, in units people read."""
    name = str(dtype).removeprefix("torch.")
    return {
        f"{name} matmul, GFLOP/s": matmul_flops(device, dtype) / 1e9,
        "copy, GB/s": copy_bytes(device) / 1e9,
    }
