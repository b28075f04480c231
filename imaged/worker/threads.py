"""How the threads of a process that computes wait for each other; set before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping


def waiting(workers: int, threads: int, environ: Mapping[str, str]) -> dict[str, str]:
    """How the workers' threads wait for each other, as libgomp reads it (decision 17).

    Awake for a thirtieth of its own time, or not at all where they are more than the cores that
    they may use; as the environment says if it does.
    """
    if "OMP_WAIT_POLICY" in environ:
        return {}
    everything = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everything
    given = environ.get("OMP_NUM_THREADS", "")
    each = threads or (int(given) if given.isdigit() else cores)
    return {"OMP_WAIT_POLICY": "PASSIVE"} if workers * each > cores else {"GOMP_SPINCOUNT": "10000"}
