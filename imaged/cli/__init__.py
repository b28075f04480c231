"""The command line: serve, worker, generate, explain, verify, keys, models, jobs.

Each file adds its commands to `main`; what is heavy is imported inside the command.
"""

from imaged.cli import explain, generate, jobs, keys, models, serve, verify  # noqa: F401 (adds commands)
from imaged.cli.app import main

__all__ = ["main"]
