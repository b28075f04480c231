"""Group commit: many small writes of one process share a transaction and its fsync."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import sqlalchemy as sa

from imaged.store.db import Database

T = TypeVar("T")
Work = Callable[[sa.Connection], Any]

MOST_A_COMMIT = 64


class Writer:
    """One thread that runs submitted functions, each in its own savepoint, and commits them
    together. A future resolves only after the commit that holds its work.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._queue: queue.SimpleQueue[tuple[Work, Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[sa.Connection], T]) -> Future[T]:
        """Run `work(connection)`; its exception undoes its own writes and nobody else's."""
        future: Future[T] = Future()
        self._queue.put((work, future))
        return future

    def close(self) -> None:
        """Finish what was submitted, then stop."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, closing = [first], False
            while len(batch) < MOST_A_COMMIT and not self._queue.empty():
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
        except Exception as error:  # the commit failed: nothing of the batch happened
            results = [(future, None, error) for _, future in batch]
        for future, value, failure in results:
            if failure is None:
                future.set_result(value)
            else:
                future.set_exception(failure)


def _in_savepoint(connection: sa.Connection, work: Work) -> tuple[Any, BaseException | None]:
    """What the work returned or raised.

    An error of the database itself is raised: on a full disk SQLite undoes the whole transaction,
    not the statement, and the batch must not be reported as done.
    """
    try:
        with connection.begin_nested():
            return work(connection), None
    except sa.exc.DBAPIError:
        raise
    except Exception as error:
        return None, error
