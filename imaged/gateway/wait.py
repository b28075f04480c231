"""Reading jobs: one query for all who ask at the same moment, and waiting for the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from typing import Generic, TypeVar

from starlette.types import Receive

from imaged.errors import BadParameter, UnknownRequest
from imaged.gateway.kept import Kept
from imaged.gateway.lookout import Lookout
from imaged.jobs import Job, Preview, Stand
from imaged.store import progress, queue
from imaged.store.db import Database
from imaged.store.keys import Key

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


class Board:
    """What the store knows of jobs, for many who ask at once."""

    def __init__(
        self, db: Database, kept: Kept, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self._db, self._stopping = db, stopping
        self._lookout = Lookout(kept, self._read_stands, stopping)
        self._jobs = _Gathered(self._read)
        self._previews = _Gathered(self._read_previews)

    async def job(self, key: Key, job_id: str) -> Job:
        """The key's job as the store has it now.

        Raises UnknownRequest; a job of another key is as unknown as none.
        """
        job = await self._jobs.get(job_id)
        if job is None or job.key_id != key.id:
            raise UnknownRequest(f"Request {job_id[:64]} not found")
        return job

    async def after(self, job: Job, wait_s: float) -> Job | None:
        """A job in hand as the store has it once it has moved on, or as it was when waiting is
        over: after `wait_s` seconds, or when the server is stopping. None once it is forgotten.
        """
        before = job.stand
        moved = await self._lookout.wait(job.id, lambda now: now != before, wait_s)
        return await self._jobs.get(job.id) if moved else job

    async def preview(self, job: Job) -> Preview | None:
        """The newest preview of a running job, or None."""
        return await self._previews.get(job.id)

    async def settled(self, key: Key, job_id: str, wait_s: float, receive: Receive) -> Job:
        """The key's job when it has ended or rests, or as it stands when waiting is over: after
        `wait_s` seconds, when the caller of this request has hung up, or when the server is
        stopping. The job itself goes on.
        """
        deadline = time.monotonic() + wait_s
        job = await self.job(key, job_id)
        if job.state.waits or not wait_s:
            return job
        gone = asyncio.create_task(_hung_up(receive))
        try:
            while not job.state.waits and (left_s := deadline - time.monotonic()) > 0:
                await self._lookout.wait(job_id, _rests, left_s, gone)
                if gone.done():
                    break
                job = await self.job(key, job_id)
                if self._stopping():
                    break
        finally:
            gone.cancel()
        return job

    def _read(self, ids: list[str]) -> dict[str, Job]:
        """Jobs by id; an expired one is gone even if its row is not yet. A draft that nobody has
        finished in time is there until it has been ended.
        """
        with self._db.read() as connection:
            found = queue.read(connection, ids)
        now = time.time()
        return {
            k: job
            for k, job in found.items()
            if not job.state.final or not job.expires_at or job.expires_at > now
        }

    def _read_stands(self, ids: Collection[str]) -> dict[str, Stand]:
        with self._db.read() as connection:
            return progress.stands(connection, ids)

    def _read_previews(self, ids: list[str]) -> dict[str, Preview]:
        with self._db.read() as connection:
            return progress.previews(connection, ids)


def _rests(stand: Stand | None) -> bool:
    """Nothing more happens by itself, or the job is forgotten."""
    return stand is None or stand.state.waits


async def _hung_up(receive: Receive) -> None:
    """Returns when the caller has gone away; a body that nobody wants is thrown away."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Gathered(Generic[T]):
    """Coalesces reads: while one query runs, all further ids gather for the next."""

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
