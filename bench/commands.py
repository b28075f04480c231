"""Every command: importing this adds them to `main`."""

from bench import (  # noqa: F401 (adds commands)
    bf16,
    crowd,
    exact,
    full,
    gpu,
    models,
    polls,
    recovery,
    report,
    savings,
    sigmas,
    single,
    start,
    waiting,
)
from bench.app import main

__all__ = ["main"]
