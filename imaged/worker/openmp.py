"""OpenMP wait policy of worker processes; has to be set before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping


def waiting(workers: int, threads: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for libgomp (decision 17): a short spin (a thirtieth of its default),
    or a passive wait where threads outnumber cores. Empty if the environment sets a policy.
    """
    if "OMP_WAIT_POLICY" in environ:
        return {}
    everything = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everything
    given = environ.get("OMP_NUM_THREADS", "")
    each = threads or (int(given) if given.isdigit() else cores)
    return {"OMP_WAIT_POLICY": "PASSIVE"} if workers * each > cores else {"GOMP_SPINCOUNT": "10000"}
