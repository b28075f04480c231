"""Reads of jobs, coalesced into one query for all callers of a moment, and waiting for
their end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from typing import Generic, TypeVar

from starlette.types import Receive

from imaged.errors import BadParameter, UnknownRequest
from imaged.gateway.read.job_watcher import JobWatcher
from imaged.gateway.transport.response_cache import ResponseCache
from imaged.jobs import Job, JobStatus, Preview
from imaged.store.accounts.keys import Key
from imaged.store.jobs import progress, queue
from imaged.store.sql.database import Database

T = TypeVar("T")


def read_wait(text: str, longest_s: float) -> float:
    """The parameter `wait`, in seconds; raises BadParameter."""
    try:
        wait_s = float(text)
    except ValueError:
        wait_s = -1.0
    if not 0 <= wait_s <= longest_s:
        raise BadParameter("wait", f"should be a number between 0 and {longest_s:.0f}")
    return wait_s


class JobReader:
    """Jobs by id, for their owners only, and waits for changes."""

    def __init__(
        self, db: Database, cache: ResponseCache, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self._db, self._stopping = db, stopping
        self._watcher = JobWatcher(cache, self._read_statuses, stopping)
        self._jobs = CoalescedReads(self._read)
        self._previews = CoalescedReads(self._read_previews)

    async def job(self, key: Key, job_id: str) -> Job:
        """A job of this key; raises UnknownRequest, also for a job of another key."""
        job = await self._jobs.get(job_id)
        if job is None or job.key_id != key.id:
            raise UnknownRequest(f"Request {job_id[:64]} not found")
        return job

    async def after(self, job: Job, wait_s: float) -> Job | None:
        """The job after its next change, or unchanged after wait_s seconds; None once it is
        deleted. A stopping server ends the wait.
        """
        before = job.status
        moved = await self._watcher.wait(job.id, lambda now: now != before, wait_s)
        return await self._jobs.get(job.id) if moved else job

    async def preview(self, job: Job) -> Preview | None:
        """The newest preview of a running job, or None."""
        return await self._previews.get(job.id)

    async def wait_for_end(self, key: Key, job_id: str, wait_s: float, receive: Receive) -> Job:
        """The key's job once it has ended or rests; as it is after wait_s seconds, when the client
        disconnects, or when the server stops. The job runs on.
        """
        deadline = time.monotonic() + wait_s
        job = await self.job(key, job_id)
        if job.state.at_rest or not wait_s:
            return job
        gone = asyncio.create_task(_hung_up(receive))
        try:
            while not job.state.at_rest and (left_s := deadline - time.monotonic()) > 0:
                await self._watcher.wait(job_id, at_rest, left_s, gone)
                if gone.done():
                    break
                job = await self.job(key, job_id)
                if self._stopping():
                    break
        finally:
            gone.cancel()
        return job

    def _read(self, ids: list[str]) -> dict[str, Job]:
        """Jobs by id, without expired ones, whose rows are deleted later."""
        with self._db.read() as connection:
            found = queue.read(connection, ids)
        now = time.time()
        return {
            k: job
            for k, job in found.items()
            if not job.state.final or not job.expires_at or job.expires_at > now
        }

    def _read_statuses(self, ids: Collection[str]) -> dict[str, JobStatus]:
        with self._db.read() as connection:
            return progress.statuses(connection, ids)

    def _read_previews(self, ids: list[str]) -> dict[str, Preview]:
        with self._db.read() as connection:
            return progress.previews(connection, ids)


def at_rest(status: JobStatus | None) -> bool:
    """Whether a job has ended, rests, or was deleted."""
    return status is None or status.state.at_rest


async def _hung_up(receive: Receive) -> None:
    """Return when the client disconnects; further body is discarded."""
    while (await receive())["type"] != "http.disconnect":
        pass


class CoalescedReads(Generic[T]):
    """While one query runs, further ids are collected for the next."""

    def __init__(self, read: Callable[[list[str]], Mapping[str, T]]) -> None:
        self._read = read
        self._asked: dict[str, list[asyncio.Future[T | None]]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def get(self, job_id: str) -> T | None:
        future: asyncio.Future[T | None] = asyncio.get_running_loop().create_future()
        self._asked.setdefault(job_id, []).append(future)
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_all())
        return await future

    async def _read_all(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, {}
            try:
                found = await asyncio.to_thread(self._read, list(asked))
            except Exception as error:
                for future in [f for futures in asked.values() for f in futures]:
                    if not future.done():
                        future.set_exception(error)
                continue
            for job_id, futures in asked.items():
                for future in futures:
                    if not future.done():  # its request may have gone away
                        future.set_result(found.get(job_id))
