"""`imaged`, and `python -m imaged`"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn

from imaged.cli import main


def run() -> NoReturn:
    """Run the command line, then end the process at once: Python's tear-down of torch's modules
    takes a quarter of a second, to free memory that the system takes back anyway.
    """
    try:
        main(prog_name="imaged")
    except SystemExit as end:
        if end.code or "torch" not in sys.modules or any(map(_works, threading.enumerate())):
            raise
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # whoever began this process may have closed it
            stream.flush()
    os._exit(0)


def _works(thread: threading.Thread) -> bool:
    """Whether the end of the process would have waited for it."""
    return not thread.daemon and thread is not threading.main_thread()


if __name__ == "__main__":
    run()
