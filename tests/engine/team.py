"""A worker's life in a process of its own, which counts its threads after each part of it.

`python -m tests.engine.team FOLDER [MUTANT]` prints {part: threads that are not Python's own}: a
few that were there from the start, and a team for each live thread that called torch's arithmetic.
FOLDER holds a LoRA of micro, loras/ink.safetensors, and a second checkpoint, other.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy  # noqa: F401 (its threads, if it has any, are there from the start)
import torch

from imaged.catalogue.model import Model, Weights
from imaged.engine import engine
from imaged.engine.loading.load import set_threads
from imaged.jobs import State
from imaged.params.image_params import ImageParams
from imaged.prompt import Lora
from imaged.worker import checkpoint_cache, image_checker
from tests.conftest import until
from tests.engine.test_worker import Bench, opened

TINY = ImageParams("a house", num_inference_steps=4, seed=1, img_width=128, img_height=128)
THREADS = 3  # of torch, however many cores there are
PATIENCE_S = 90.0
SAME_S = 0.5  # a thread that ends takes a moment: a count holds when it was the same for so long


def pass_all(rgb: bytes, width: int, height: int) -> None:
    """An operator's checker that computes."""
    rows = torch.frombuffer(bytearray(rgb), dtype=torch.uint8).float().view(height, -1)
    torch.mm(rows.repeat(8, 1), rows.T)


def foreign() -> int:
    """Threads of this process that Python did not start, once their number holds."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < SAME_S:
        now = len(os.listdir("/proc/self/task")) - threading.active_count()
        if now != last:
            last, since = now, time.monotonic()
        time.sleep(0.02)
    return last


def live(bench: Bench, counts: dict[str, int]) -> None:
    """Everything that a worker does, with a look at its threads after each."""

    def wait(what: Callable[[], bool]) -> None:
        until(what, PATIENCE_S, every_s=0.01, say=lambda: counts)

    def ended(*job_ids: str, state: State = State.COMPLETED) -> None:
        wait(lambda: all(bench.job(job_id).state is state for job_id in job_ids))

    ended(bench.put(TINY))
    counts["loaded, one picture checked"] = foreign()
    ended(*(bench.put(replace(TINY, seed=seed, samples=2)) for seed in (1, 5)))
    counts["a crowd, with trials of its row counts"] = foreign()
    saved = bench.put(replace(TINY, num_inference_steps=20))
    wait(lambda: any(bench.files.rglob(f"{saved}-*.state")))
    ended(saved)
    counts["previews, saved"] = foreign()
    ended(bench.put(TINY, draft_steps=2), state=State.PARKED)
    counts["a draft"] = foreign()
    ended(bench.put(replace(TINY, loras=(Lora("ink"),))))
    counts["a LoRA"] = foreign()
    ended(bench.put(TINY, model="other"))
    counts["a second checkpoint"] = foreign()


def kept_loader() -> None:
    """Mutant: the thread that loads stays."""
    pool = ThreadPoolExecutor(1, "loader")
    checkpoint_cache.in_daemon = lambda _, load: pool.submit(load)  # type: ignore[assignment,attr-defined]


def kept_decoder() -> None:
    """Mutant: pictures are decoded beside the loop."""
    engine.decoder = lambda _: ThreadPoolExecutor(1, "decoder")  # type: ignore[assignment,attr-defined]


def kept_checker() -> None:
    """Mutant: an operator's checker always runs in the same thread."""
    pool = ThreadPoolExecutor(1, "checker")
    image_checker._in_time = lambda call: pool.submit(call).result()


MUTANTS = {"loader": kept_loader, "decoder": kept_decoder, "checker": kept_checker}


def main(folder: Path, mutant: str) -> None:
    if mutant:
        MUTANTS[mutant]()
    set_threads(THREADS)
    other = Model("other", "other", Weights(folder / "other"))
    settings = {"loras": folder / "loras", "park_s": 0.02, "checker": "tests.engine.team:pass_all"}
    counts: dict[str, int] = {}
    with opened(folder / "data", other, **settings) as bench:
        counts["before"] = foreign()

        def drive() -> None:
            try:
                live(bench, counts)
            finally:
                bench.worker.stop(drain_s=0.0)

        driver = threading.Thread(target=drive)
        driver.start()
        bench.worker.load_and_wait(
            bench.model
        )  # the thread that computes is this one, as in a worker
        bench.worker.run()
        driver.join()
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "".join(sys.argv[2:]))
