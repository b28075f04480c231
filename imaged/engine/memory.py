"""What out of memory looks like."""

from __future__ import annotations

from typing import TypeGuard

import torch


def is_full(error: BaseException | None) -> TypeGuard[RuntimeError | MemoryError]:
    """Whether the device, or the host, had no more memory; torch tells of the CPU's in words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
