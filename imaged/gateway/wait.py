"""Reading jobs: one query for all who ask at the same moment, and waiting for the end."""

from __future__ import annotations

import asyncio
import time

from imaged.errors import UnknownRequest
from imaged.jobs import Job
from imaged.store import queue
from imaged.store.db import Database
from imaged.store.keys import Key

TICK_S = 0.05  # how often a waiting request looks


class Board:
    """Coalesces reads: while one query runs, all further ids gather for the next."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._asked: dict[str, list[asyncio.Future[Job | None]]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def job(self, key: Key, job_id: str) -> Job:
        """The key's job as the store has it now.

        Raises UnknownRequest; a job of another key is as unknown as none.
        """
        job = await self._job(job_id)
        if job is None or job.key_id != key.id:
            raise UnknownRequest(f"Request {job_id[:64]} not found")
        return job

    async def settled(self, key: Key, job_id: str, wait_s: float) -> Job:
        """The key's job when it has ended, or as it stands after `wait_s` seconds."""
        deadline = time.monotonic() + wait_s
        job = await self.job(key, job_id)
        while not job.state.final and time.monotonic() < deadline:
            await asyncio.sleep(TICK_S)
            job = await self.job(key, job_id)
        return job

    async def _job(self, job_id: str) -> Job | None:
        future: asyncio.Future[Job | None] = asyncio.get_running_loop().create_future()
        self._asked.setdefault(job_id, []).append(future)
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_all())
        return await future

    async def _read_all(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, {}
            try:
                jobs = await asyncio.to_thread(self._read, list(asked))
            except Exception as error:
                for future in [f for futures in asked.values() for f in futures]:
                    if not future.done():
                        future.set_exception(error)
                continue
            for job_id, futures in asked.items():
                for future in futures:
                    if not future.done():  # its request may have gone away
                        future.set_result(jobs.get(job_id))

    def _read(self, ids: list[str]) -> dict[str, Job]:
        """Jobs by id; an expired one is gone even if its row is not yet."""
        with self._db.read() as connection:
            found = queue.read(connection, ids)
        now = time.time()
        return {k: job for k, job in found.items() if not job.expires_at or job.expires_at > now}
