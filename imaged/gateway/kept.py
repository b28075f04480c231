"""Answers that are given again: who waits for a job asks the same, byte for byte, every second.

While nobody writes to the store, the same request from the same address has the same answer. The
connection gives it, as it was sent the first time, and neither parses the request nor asks the app.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from imaged.store.db import Watch

log = logging.getLogger(__name__)

MOST_KEPT = 5_000
LONGEST = 2_048  # bytes of a request whose answer is kept, and which the answer may repeat
#: The ASGI extension by which the app says, before it answers a request, that its answer may be
#: kept: a function of the `writes` seen before it was read, and until when it holds.
EXTENSION = "imaged.keep"

Ident = tuple[str, bytes]  # the caller's address and all that it sent
Tell = Callable[[bytes | None], None]


class Kept:
    """Answers that hold while the store stays as it is.

    A write of anyone, be it a worker's progress or a revoked key, ends them all. A store that
    cannot tell of writes (see `Watch`) has none kept. One look serves all who ask in a turn of the
    loop: they are answered after it, and so whatever is answered had arrived before the look.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._answers: dict[Ident, tuple[float, bytes]] = {}
        self._asked: list[tuple[Ident, Tell]] = []
        self.writes = 0  # seen so far

    def ask(self, ident: Ident, tell: Tell) -> bool:
        """True if there is an answer; `tell` hears it soon, or None if it holds no more."""
        if len(ident[1]) > LONGEST or ident not in self._answers:
            return False
        if not self._asked:
            asyncio.get_running_loop().call_soon(self._tell_all)
        self._asked.append((ident, tell))
        return True

    def put(self, ident: Ident, writes: int, until: float, answer: bytes) -> None:
        """Keep what was read after so many `writes`."""
        if self.watch.exact and writes == self.writes and len(ident[1]) <= LONGEST:
            if len(self._answers) >= MOST_KEPT:
                self._answers.clear()
            self._answers[ident] = until, answer

    def _tell_all(self) -> None:
        asked, self._asked = self._asked, []
        self.look()
        now = time.time()
        for ident, tell in asked:
            until, answer = self._answers.get(ident, (0.0, None))
            tell(answer if until > now else None)

    def look(self) -> None:
        """Find out whether somebody has written; `writes` says so."""
        try:
            changed = self.watch.changed()
        except Exception:  # a store in trouble; whoever reads it will say so
            log.exception("the store did not say whether it was written to")
            changed = True
        if changed:
            self._answers.clear()
            self.writes += 1
