"""Response cache for status polls, keyed by client address and raw request bytes.

A client that waits for a job sends the same bytes every second. While nobody writes to the store
the answer is the same, so the connection sends the bytes of the last one, without parsing or the
app.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from imaged.store.sql.database import Watch

log = logging.getLogger(__name__)

MAX_CACHED = 5_000
MAX_REQUEST_BYTES = 2_048  # bytes of a request whose answer is cached
#: ASGI extension: a function that the app calls before it answers, to have the answer cached. It
#: takes the `writes` seen before the store was read, and until when the answer holds.
EXTENSION = "imaged.keep"

Ident = tuple[str, bytes]  # client address, raw request
Tell = Callable[[bytes | None], None]


class ResponseCache:
    """Answers that hold until anything is written to the store.

    A store that cannot tell of writes (see `Watch`) gets no cache. All requests of one iteration of
    the event loop share one check for writes, made after they arrived.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._answers: dict[Ident, tuple[float, bytes]] = {}
        self._asked: list[tuple[Ident, Tell]] = []
        self.writes = 0  # changes seen so far

    def ask(self, ident: Ident, tell: Tell) -> bool:
        """True if an answer is cached: `tell` is called within this iteration of the loop, with the
        answer or, if it does not hold any more, with None.
        """
        if len(ident[1]) > MAX_REQUEST_BYTES or ident not in self._answers:
            return False
        if not self._asked:
            asyncio.get_running_loop().call_soon(self._tell_all)
        self._asked.append((ident, tell))
        return True

    def put(self, ident: Ident, writes: int, until: float, answer: bytes) -> None:
        """Cache an answer that was read after so many `writes`; until: seconds since 1970."""
        if self.watch.exact and writes == self.writes and len(ident[1]) <= MAX_REQUEST_BYTES:
            if len(self._answers) >= MAX_CACHED:
                self._answers.clear()
            self._answers[ident] = until, answer

    def _tell_all(self) -> None:
        asked, self._asked = self._asked, []
        self.check()
        now = time.time()
        for ident, tell in asked:
            until, answer = self._answers.get(ident, (0.0, None))
            tell(answer if until > now else None)

    def check(self) -> None:
        """Check for writes: clears the cache and counts `writes`."""
        try:
            changed = self.watch.changed()
        except Exception:  # the next read of the store reports it
            log.exception("the store did not say whether it was written to")
            changed = True
        if changed:
            self._answers.clear()
            self.writes += 1
