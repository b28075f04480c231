"""The command line: serve, worker, generate, explain, verify, keys, models, jobs, config.

Each file adds its commands to `main`; what is heavy is imported inside the command.
"""

from imaged.cli import (  # noqa: F401 (adds commands)
    config,
    explain,
    generate,
    jobs,
    keys,
    models,
    serve,
    verify,
)
from imaged.cli.app import main

__all__ = ["main"]
