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

#: UNet parameters from which on bfloat16 is used: below it saves little, and changes the pictures
#: (decision 27).
MIN_BF16_PARAMETERS = 50_000_000
#: Features that compute in bfloat16, where that was measured; others, ARM's among them, count as
#: none.
BF16_FLAGS = ("avx512_bf16", "amx_bf16")
#: Values of ONEDNN_MAX_CPU_ISA or DNNL_MAX_CPU_ISA that forbid these: oneDNN then converts to
#: float32 and back.
ISAS_WITHOUT_BF16 = (
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"),
    *("AVX512_CORE", "AVX512_CORE_VNNI"),
)
#: Environment variables that make oneDNN and MKL choose other kernels.
KERNEL_VARIABLES = (
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS", "DNNL_CPU_ISA_HINTS"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    *("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "MKL_DEBUG_CPU_TYPE"),
)


def cpu_name(environ: Mapping[str, str] = os.environ) -> str:
    """The CPU as far as it affects an image's bits: PyTorch's instruction set, the processor by
    name, a digest of what else libraries choose kernels by, and threads.

    oneDNN and MKL choose by vendor, instructions and cache sizes: two processors with AVX-512 may
    give different bits.
    """
    facts = _capabilities()
    name = facts.get("cpu_name") or platform.machine()
    alike = {key: value for key, value in facts.items() if not key.startswith("num_")}
    chosen = {key: environ[key] for key in KERNEL_VARIABLES if environ.get(key)}
    digest = hashlib.sha256(json.dumps([alike, chosen], sort_keys=True).encode()).hexdigest()
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"CPU {kernels}, {name} {digest[:8]}, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class Cpu:
    """What decides whether matrix products are computed in bfloat16.

    flags: the processor's features. own: the instruction set that PyTorch's own kernels are limited
    to. products: the one that oneDNN's are limited to; empty: no limit.
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
        allowed = self.own.startswith("AVX512") and self.products.upper() not in ISAS_WITHOUT_BF16
        return allowed and not self.flags.isdisjoint(BF16_FLAGS)


@cache
def flags() -> frozenset[str]:
    """Features of the CPU as PyTorch reports them; none if PyTorch was built without oneDNN."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return frozenset()
    return frozenset(name for name, value in _capabilities().items() if value is True)


@cache
def _capabilities() -> Mapping[str, bool | int | str]:
    """Instructions, caches, cores and the name of the CPU, as PyTorch finds them."""
    return dict(torch.cpu.get_capabilities())


def cpu_dtype(parameters: int, cpu: Cpu) -> tuple[str, str]:
    """(dtype, reason): what a CPU should hold UNet and text encoders in, for a UNet of so many
    parameters.
    """
    size = f"its UNet has {parameters / 1e6:.3g} M parameters"
    if not cpu.has_bf16:
        return "fp32", "this CPU does not compute in bfloat16 itself"
    if parameters < MIN_BF16_PARAMETERS:
        least = f"{MIN_BF16_PARAMETERS / 1e6:.0f} M"
        return "fp32", f"{size}, and bf16 saves time worth it from {least} on"
    return "bf16", f"this CPU computes in bfloat16 itself, and {size}"
