"""Waits for changes of jobs: one task reads the store for all waiters and wakes those concerned."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from imaged.gateway.transport.response_cache import ResponseCache
from imaged.jobs import JobStatus

log = logging.getLogger(__name__)

REST = 4  # the pause after a read is so many times as long, and MAX_REST_S at most
MAX_REST_S = 0.05

Moved = Callable[[JobStatus | None], bool]


class JobWatcher:
    """Runs only while somebody waits. After each write it reads the status of all jobs that are
    waited for, in one narrow query, and wakes the waiters whose job has changed.
    """

    def __init__(
        self,
        cache: ResponseCache,
        read: Callable[[Collection[str]], Mapping[str, JobStatus]],
        stopping: Callable[[], bool],
    ) -> None:
        self._cache, self._read, self._stopping = cache, read, stopping
        self._waiting: dict[asyncio.Future[None], tuple[str, Moved]] = {}
        self._new: set[str] = set()  # jobs of waiters since the last read
        self._writes = -1  # seen before the last read
        self._stir = asyncio.Event()  # set by a write hint or a new waiter
        self._task: asyncio.Task[None] | None = None

    async def wait(
        self, job_id: str, moved: Moved, wait_s: float, *others: asyncio.Future[None]
    ) -> bool:
        """True once `moved` is true of the job's status, the server stops, or a read fails; False
        once one of the `others` is done or wait_s seconds are over.

        The status is read at the start too, so no write since the caller's own read is missed.
        """
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._task is None or self._task.done():
            self._begin()
        self._waiting[woken] = job_id, moved
        self._new.add(job_id)
        self._stir.set()
        try:
            await asyncio.wait(
                (woken, *others), timeout=wait_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            del self._waiting[woken]
            if not self._waiting:
                self._end()
        return woken.done()

    def _begin(self) -> None:
        if (hint := self._cache.watch.hint) is not None:
            asyncio.get_running_loop().add_reader(hint, self._hear)
        self._task = asyncio.create_task(self._run())

    def _end(self) -> None:
        if (hint := self._cache.watch.hint) is not None:
            asyncio.get_running_loop().remove_reader(hint)
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _hear(self) -> None:
        self._cache.watch.hear()
        self._stir.set()

    async def _run(self) -> None:
        """Until cancelled by the last waiter."""
        while True:
            self._stir.clear()
            await asyncio.sleep(await self._poll())
            with suppress(TimeoutError):
                async with asyncio.timeout(self._cache.watch.pause_s):
                    await self._stir.wait()

    async def _poll(self) -> float:
        """Read and wake; returns the pause after it in seconds."""
        if self._stopping():
            self._wake(lambda *_: True)
            return 0.0
        ids = self._to_read()
        if not ids:
            return 0.0
        begun = time.monotonic()
        try:
            found = await asyncio.to_thread(self._read, ids)
        except Exception:  # the waiters read the store themselves and report it
            log.exception("the store did not say where jobs stand")
            self._wake(lambda *_: True)
            return MAX_REST_S
        self._wake(lambda job_id, moved: job_id in ids and moved(found.get(job_id)))
        return min(REST * (time.monotonic() - begun), MAX_REST_S)

    def _to_read(self) -> set[str]:
        """All jobs that are waited for after a write, else those of new waiters."""
        self._cache.check()
        new, self._new = self._new, set()
        if self._writes == self._cache.writes:
            return new
        self._writes = self._cache.writes
        return {job_id for job_id, _ in self._waiting.values()}

    def _wake(self, whom: Callable[[str, Moved], bool]) -> None:
        for woken, (job_id, moved) in self._waiting.items():
            if not woken.done() and whom(job_id, moved):
                woken.set_result(None)
