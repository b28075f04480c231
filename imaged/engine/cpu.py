"""The CPU: how results name it, as far as it affects bits, and whether to compute in bfloat16 on
it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

#: UNet parameters from which on bfloat16 is worth its other pictures (decision 27).
PAYS = 50_000_000
#: Flags of CPUs whose bfloat16 was measured. Others, of ARM among them, are taken to have none.
FLAGS = ("avx512_bf16", "amx_bf16")
#: Values of ONEDNN_MAX_CPU_ISA, or DNNL_MAX_CPU_ISA, that forbid them: oneDNN then converts to
#: float32 and back.
OLDER = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
#: What in the environment has oneDNN and MKL take other kernels than the CPU would have.
CHOICES = (
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS", "DNNL_CPU_ISA_HINTS"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    *("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "MKL_DEBUG_CPU_TYPE"),
)


def described(environ: Mapping[str, str] = os.environ) -> str:
    """The CPU as far as it affects an image's bits: PyTorch's instruction set, the processor by
    name, a digest of what else libraries choose kernels by, and threads.

    oneDNN and MKL choose by vendor, instructions and cache sizes: two processors with AVX-512 may
    give different bits.
    """
    facts = _capabilities()
    name = facts.get("cpu_name") or platform.machine()
    alike = {key: value for key, value in facts.items() if not key.startswith("num_")}
    chosen = {key: environ[key] for key in CHOICES if environ.get(key)}
    digest = hashlib.sha256(json.dumps([alike, chosen], sort_keys=True).encode()).hexdigest()
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"CPU {kernels}, {name} {digest[:8]}, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class Cpu:
    """What of the CPU and its environment says whether products are made in bfloat16.

    flags: what it has. own: the instructions that PyTorch's own kernels are limited to.
    products: the ones that oneDNN's are; empty: all.
    """

    flags: frozenset[str]
    own: str
    products: str = ""

    @classmethod
    def here(cls, environ: Mapping[str, str] = os.environ) -> Cpu:
        return cls(
            flags(),
            torch.backends.cpu.get_cpu_capability(),
            environ.get("ONEDNN_MAX_CPU_ISA") or environ.get("DNNL_MAX_CPU_ISA", ""),
        )

    @property
    def has_bf16(self) -> bool:
        allowed = self.own.startswith("AVX512") and self.products.upper() not in OLDER
        return allowed and not self.flags.isdisjoint(FLAGS)


@cache
def flags() -> frozenset[str]:
    """What the CPU has, as PyTorch finds it; none where PyTorch has no oneDNN to use it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return frozenset()
    return frozenset(name for name, value in _capabilities().items() if value is True)


@cache
def _capabilities() -> Mapping[str, bool | int | str]:
    """Instructions, caches, cores and the name of the CPU, as PyTorch finds them."""
    return dict(torch.cpu.get_capabilities())


def suited(parameters: int, cpu: Cpu) -> tuple[str, str]:
    """The type that a CPU should hold UNet and text encoders in, for a UNet of so many parameters,
    and why.
    """
    size = f"its UNet has {parameters / 1e6:.3g} M parameters"
    if not cpu.has_bf16:
        return "fp32", "this CPU does not compute in bfloat16 itself"
    if parameters < PAYS:
        return "fp32", f"{size}, and bf16 saves time worth it from {PAYS / 1e6:.0f} M on"
    return "bf16", f"this CPU computes in bfloat16 itself, and {size}"
