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
SHARE = 0.2  # of the processor's time, for one key
AT_ONCE_S = 1.0  # what a key that has not come for a while may take beyond its share


class Turns:
    """Long texts take a core for a moment, and polls come first."""

    def __init__(self) -> None:
        self._one = asyncio.Semaphore(1)
        self._waiting: Counter[int] = Counter()
        self._even: dict[int, float] = {}  # when what a key took will have been its share

    async def take(self, key_id: int, work: Callable[[], T]) -> T:
        """What `work` returns, which is done in a thread. Raises TooFast for a key with too many
        waiting, and for one that has had more than its share.
        """
        wait_s = self._even.get(key_id, 0.0) - time.monotonic() - AT_ONCE_S / SHARE
        if wait_s > 0 or self._waiting[key_id] >= MOST_WAITING:
            raise TooFast(max(wait_s, AT_ONCE_S), time.time())
        self._waiting[key_id] += 1
        try:
            async with self._one:
                result, took_s = await asyncio.to_thread(_timed, work)
        finally:
            self._waiting -= Counter([key_id])
        if len(self._even) > 10_000:
            self._even.clear()
        now = time.monotonic()
        self._even[key_id] = max(self._even.get(key_id, now), now) + took_s / SHARE
        return result


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result, and seconds of the processor."""
    began = time.thread_time()
    return work(), time.thread_time() - began
