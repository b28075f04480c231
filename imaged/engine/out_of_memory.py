"""Recognizing out-of-memory errors."""

from __future__ import annotations

from typing import TypeGuard

import torch


def is_full(error: BaseException | None) -> TypeGuard[RuntimeError | MemoryError]:
    """Whether device or host ran out of memory; of the CPU's torch says so in the text alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
