"""Every command: importing this adds them to `main`."""

from bench import crowd, gpu, models, report, single, start, waiting  # noqa: F401 (adds commands)
from bench.app import main

__all__ = ["main"]
