"""Checkpoints on this worker's device: loaded when a job needs them, the least recently used one
evicted for room.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass

from imaged.catalogue.model import ModelState, Weights
from imaged.engine.engine import Engine
from imaged.engine.loading.load import Nets, best_device, memory, size
from imaged.errors import CheckpointRefused, ImagedError, JobFailed
from imaged.settings import Settings
from imaged.worker.daemon import in_daemon

log = logging.getLogger(__name__)

RETRY_LOAD_S = 30.0  # until a checkpoint that was refused is tried again


@dataclass
class _Resident:
    engine: Engine
    size: int  # bytes of its weights
    used_at: float


class CheckpointCache:
    """LRU cache of engines by weights. One checkpoint is loaded at a time, in a thread.

    load:    puts a checkpoint on the device; raises CheckpointRefused.
    measure: bytes that it will take, told from its headers.
    make:    sets up an engine.
    budget:  bytes of all weights; one checkpoint may always stay, whatever its size.
    idle_s:  seconds without a job after which a checkpoint is evicted; 0: never.
    """

    def __init__(
        self,
        load: Callable[[Weights], Nets],
        measure: Callable[[Weights], int],
        make: Callable[[Nets], Engine],
        *,
        budget: int,
        idle_s: float,
    ) -> None:
        self._load, self._measure, self._make = load, measure, make
        self._budget, self._idle_s = budget, idle_s
        self._residents: dict[Weights, _Resident] = {}
        self._refused: dict[Weights, tuple[float, CheckpointRefused]] = {}
        self._sizes: dict[Weights, int] = {}  # measured
        self._coming: tuple[Weights, Future[Nets]] | None = None
        self.changed_at = 0.0  # of the last load, in seconds since 1970

    # -- what is there ----------------------------------------------------------------------------

    def engine(self, weights: Weights) -> Engine | None:
        """The engine with these weights, if they are loaded."""
        resident = self._residents.get(weights)
        return resident.engine if resident else None

    def __iter__(self) -> Iterator[Engine]:
        return (resident.engine for resident in self._residents.values())

    def state(self, weights: Weights) -> ModelState:
        """State of their checkpoint here."""
        if self._coming and self._coming[0] == weights:
            return ModelState.STARTING
        engine = self.engine(weights)
        if engine is not None:
            return ModelState.READY if engine.idle else ModelState.BUSY
        return ModelState.UNAVAILABLE if weights in self._refused else ModelState.UNLOADED

    def refuse(self, weights: Weights, error: CheckpointRefused) -> None:
        """Do not try to load these for RETRY_LOAD_S."""
        log.error("%s: %s", weights.checkpoint.name, error.detail)
        self._refused[weights] = time.monotonic(), error

    @property
    def loading(self) -> bool:
        return self._coming is not None

    def refusal(self, weights: Weights) -> CheckpointRefused | None:
        """Why these weights were refused less than RETRY_LOAD_S ago; None if they were not."""
        at, error = self._refused.get(weights, (0.0, None))
        return error if time.monotonic() < at + RETRY_LOAD_S else None

    # -- coming and going -------------------------------------------------------------------------

    def fits(self, weights: Weights) -> bool:
        """Whether they fit after evicting idle checkpoints only; true for those that are loaded or
        were refused, and always if no checkpoint is in use.
        """
        if weights in self._residents or self.refusal(weights):
            return True
        if self._coming is not None:
            return False
        kept = sum(r.size for r in self._residents.values() if not r.engine.idle)
        return kept == 0 or kept + self._size(weights) <= self._budget

    def ask(self, weights: Weights) -> None:
        """Begin to load these weights, evicting idle ones; nothing if that is not possible now."""
        if weights in self._residents or self._coming is not None or self.refusal(weights):
            return
        self._make_room(self._size(weights))
        log.info("loading %s", weights.checkpoint.name)
        # Not in a thread that stays: it would keep its OpenMP team, and with more threads than
        # cores in all teams libgomp lets none of them spin (decision 17). In a daemon, so that the
        # process can end while a disk does not answer.
        self._coming = weights, in_daemon("loader", lambda: self._load(weights))

    def arrive(self, wait_s: float = 0.0) -> None:
        """Take in a finished load or its refusal, and evict what has been idle for idle_s."""
        now = time.monotonic()
        for resident in self._residents.values():
            if not resident.engine.idle:
                resident.used_at = now
        if self._coming is not None:
            weights, future = self._coming
            if wait_s and not future.done():
                wait([future], wait_s)
            if future.done():
                self._coming = None
                self._take(weights, future)
        if self._idle_s:
            for weights, resident in list(self._residents.items()):
                if resident.used_at < now - self._idle_s:
                    self._drop(weights)

    def close(self) -> None:
        for weights in list(self._residents):
            self._drop(weights)

    def _take(self, weights: Weights, future: Future[Nets]) -> None:
        error = future.exception()
        if isinstance(error, CheckpointRefused):
            self.refuse(weights, error)
            return
        self._refused.pop(weights, None)
        engine = self._make(future.result())
        self._residents[weights] = _Resident(engine, engine.nets.nbytes, time.monotonic())
        self.changed_at = time.time()

    def _size(self, weights: Weights) -> int:
        if weights not in self._sizes:
            try:
                self._sizes[weights] = self._measure(weights)
            except (ImagedError, OSError):
                return 0  # it will be refused
        return self._sizes[weights]

    def _make_room(self, size: int) -> None:
        """Evict idle checkpoints, least recently used first, until there is room."""
        idle = sorted(
            (resident.used_at, n, weights)
            for n, (weights, resident) in enumerate(self._residents.items())
            if resident.engine.idle
        )
        for _, _, weights in idle:
            if sum(r.size for r in self._residents.values()) + size <= self._budget:
                return
            self._drop(weights)

    def _drop(self, weights: Weights) -> None:
        log.info("unloading %s", weights.checkpoint.name)
        self._residents.pop(weights).engine.close()
        gc.collect()  # nets are in cycles, and leave before others come


def unavailable() -> JobFailed:
    """The failure of jobs whose checkpoint was refused."""
    return JobFailed("model_unavailable", "the model's checkpoint could not be loaded")


def cache_on_best_device(settings: Settings, load: Callable[[Weights], Nets]) -> CheckpointCache:
    """A cache on this worker's share of the best device."""
    device = best_device()

    def make(nets: Nets) -> Engine:
        return Engine(
            nets,
            exact=settings.determinism == "exact",
            graphs=settings.graphs == "on",
            loras=settings.loras_folder,
            embeddings=settings.embeddings_folder,
            previews=not settings.checker,  # nothing is shown that was not checked
        )

    def measure(weights: Weights) -> int:
        return size(weights, device)

    share = memory(device) // (2 * max(1, settings.workers))
    budget = int(settings.memory_gb * 1e9) or share
    return CheckpointCache(load, measure, make, budget=budget, idle_s=settings.idle_s)
