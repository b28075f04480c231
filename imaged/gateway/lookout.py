"""One task that looks at the store for all who wait, and wakes those whom a write concerns."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from imaged.gateway.kept import Kept
from imaged.jobs import Stand

log = logging.getLogger(__name__)

REST = 4  # times what a read took there is none after it: at most a fifth of the time is read
LONGEST_REST_S = 0.05

Moved = Callable[[Stand | None], bool]


class Lookout:
    """Looks only while somebody waits. A write has it read, in one narrow query, where the jobs
    stand that are waited for; who finds that theirs has moved is woken, and nobody else.
    """

    def __init__(
        self,
        kept: Kept,
        read: Callable[[Collection[str]], Mapping[str, Stand]],
        stopping: Callable[[], bool],
    ) -> None:
        self._kept, self._read, self._stopping = kept, read, stopping
        self._waiting: dict[asyncio.Future[None], tuple[str, Moved]] = {}
        self._new: set[str] = set()  # jobs of those who have come since the last read
        self._writes = -1  # seen before the last read
        self._stir = asyncio.Event()  # somebody writes
        self._task: asyncio.Task[None] | None = None

    async def wait(
        self, job_id: str, moved: Moved, wait_s: float, *others: asyncio.Future[None]
    ) -> bool:
        """Until the job is seen to have `moved` or the server is stopping: True; or until one of
        the `others` is done or time is up: False.

        The job is looked at once at the start: a write before this call, after the caller's own
        read, is heard too.
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
        if (hint := self._kept.watch.hint) is not None:
            asyncio.get_running_loop().add_reader(hint, self._hear)
        self._task = asyncio.create_task(self._run())

    def _end(self) -> None:
        if (hint := self._kept.watch.hint) is not None:
            asyncio.get_running_loop().remove_reader(hint)
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _hear(self) -> None:
        self._kept.watch.hear()
        self._stir.set()

    async def _run(self) -> None:
        """Until cancelled, which is by the last who waits."""
        while True:
            self._stir.clear()
            await asyncio.sleep(await self._look())
            with suppress(TimeoutError):
                async with asyncio.timeout(self._kept.watch.pause_s):
                    await self._stir.wait()

    async def _look(self) -> float:
        """Wake whom it concerns; for how long to rest after it."""
        if self._stopping():
            self._wake(lambda *_: True)
            return 0.0
        ids = self._to_read()
        if not ids:
            return 0.0
        begun = time.monotonic()
        try:
            found = await asyncio.to_thread(self._read, ids)
        except Exception:  # a store in trouble; whoever is woken reads it and says so
            log.exception("the store did not say where jobs stand")
            self._wake(lambda *_: True)
            return LONGEST_REST_S
        self._wake(lambda job_id, moved: job_id in ids and moved(found.get(job_id)))
        return min(REST * (time.monotonic() - begun), LONGEST_REST_S)

    def _to_read(self) -> set[str]:
        """All jobs that are waited for if anybody has written, else those that were not read."""
        self._kept.look()
        new, self._new = self._new, set()
        if self._writes == self._kept.writes:
            return new
        self._writes = self._kept.writes
        return {job_id for job_id, _ in self._waiting.values()}

    def _wake(self, whom: Callable[[str, Moved], bool]) -> None:
        for woken, (job_id, moved) in self._waiting.items():
            if not woken.done() and whom(job_id, moved):
                woken.set_result(None)
