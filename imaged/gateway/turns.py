"""Work that costs nothing and may be long: one piece at a time, and no key all the time."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from imaged.errors import TooFast

T = TypeVar("T")

MOST_WAITING = 8  # of one key
LONG_S, PAUSE = 0.2, 4.0  # of the processor; who took more waits so many times what it took


class Turns:
    """Long texts take a core for a moment, and polls come first."""

    def __init__(self) -> None:
        self._one = asyncio.Semaphore(1)
        self._waiting: Counter[int] = Counter()
        self._again: dict[int, float] = {}  # when a key may come again

    async def take(self, key_id: int, work: Callable[[], T]) -> T:
        """What `work` returns, which is done in a thread. Raises TooFast for a key with too many
        waiting, and for one that has just had much.
        """
        wait_s = self._again.get(key_id, 0.0) - time.monotonic()
        if wait_s > 0 or self._waiting[key_id] >= MOST_WAITING:
            raise TooFast(max(wait_s, LONG_S), time.time())
        self._waiting[key_id] += 1
        try:
            async with self._one:
                result, took_s = await asyncio.to_thread(_timed, work)
        finally:
            self._waiting -= Counter([key_id])
        if took_s > LONG_S:
            if len(self._again) > 10_000:
                self._again.clear()
            self._again[key_id] = time.monotonic() + PAUSE * took_s
        return result


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result, and seconds of the processor."""
    began = time.thread_time()
    return work(), time.thread_time() - began
