"""Write hints: inotify events of a file, on Linux."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

MODIFIED = 0x2  # IN_MODIFY
PLENTY = 65_536  # bytes of events; their content does not matter


def listen(path: Path) -> int | None:
    """A descriptor that becomes readable when the file is written; None where that is not
    possible.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL(None)
        descriptor = int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    except (OSError, AttributeError):  # a Python without a C library to call
        return None
    if descriptor < 0:  # this user has too many of them
        return None
    if libc.inotify_add_watch(descriptor, os.fsencode(path), MODIFIED) < 0:
        os.close(descriptor)
        return None
    return descriptor


def take(descriptor: int) -> None:
    """Consume all events."""
    with contextlib.suppress(BlockingIOError):
        os.read(descriptor, PLENTY)
