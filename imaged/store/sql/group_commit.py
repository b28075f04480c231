"""Group commit: many small writes of one process share a transaction and its fsync."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import sqlalchemy as sa

from imaged.store.sql.database import Database

T = TypeVar("T")
Work = Callable[[sa.Connection], Any]

MAX_WRITES_PER_COMMIT = 64


class Writer:
    """A thread that runs submitted functions, each in a savepoint, and commits them together.
    Futures resolve after the commit.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._queue: queue.SimpleQueue[tuple[Work, Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[sa.Connection], T]) -> Future[T]:
        """Run `work(connection)`; an exception rolls back its own writes only."""
        future: Future[T] = Future()
        self._queue.put((work, future))
        return future

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """`submit` for a coroutine: its result, after the commit."""
        return await asyncio.wrap_future(self.submit(work))

    def close(self) -> None:
        """Finish what was submitted, then stop."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, closing = [first], False
            while len(batch) < MAX_WRITES_PER_COMMIT and not self._queue.empty():
                item = self._queue.get()
                if item is None:
                    closing = True
                    break
                batch.append(item)
            self._commit(batch)
            if closing:
                return

    def _commit(self, batch: list[tuple[Work, Future[Any]]]) -> None:
        batch = [item for item in batch if item[1].set_running_or_notify_cancel()]
        results: list[tuple[Future[Any], Any, BaseException | None]] = []
        try:
            with self._db.write() as connection:
                for work, future in batch:
                    results.append((future, *_in_savepoint(connection, work)))
        except Exception as error:  # the commit failed: the whole batch is rolled back
            results = [(future, None, error) for _, future in batch]
        for future, value, failure in results:
            if failure is None:
                future.set_result(value)
            else:
                future.set_exception(failure)


def _in_savepoint(connection: sa.Connection, work: Work) -> tuple[Any, BaseException | None]:
    """The work's result, or its exception.

    Database errors are raised: on a full disk SQLite rolls back the whole transaction, and the
    batch must not be reported as done.
    """
    try:
        with connection.begin_nested():
            return work(connection), None
    except sa.exc.DBAPIError:
        raise
    except Exception as error:
        return None, error
