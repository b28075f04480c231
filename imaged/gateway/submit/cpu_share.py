"""CPU-time limiter per API key, for work that is not billed (preflight, judging changed
prompts).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from cachetools import LRUCache

from imaged.errors import TooFast

T = TypeVar("T")

MAX_WAITING = 8  # of one key
SHARE = 0.2  # of one core, per key
AT_ONCE_S = 1.0  # burst: CPU seconds that an idle key may use at once


class CpuShare:
    """Runs one piece of work at a time, in a thread, so that polls stay fast."""

    def __init__(self) -> None:
        self._one = asyncio.Semaphore(1)
        self._waiting: Counter[int] = Counter()
        #: When a key's use will be within its share again, monotonic seconds.
        self._within_share_at: LRUCache[int, float] = LRUCache(10_000)

    async def run(self, key_id: int, work: Callable[[], T]) -> T:
        """The result of `work`. Raises TooFast for a key with MAX_WAITING pieces waiting, or over
        its share of CPU time.
        """
        wait_s = self._within_share_at.get(key_id, 0.0) - time.monotonic() - AT_ONCE_S / SHARE
        if wait_s > 0 or self._waiting[key_id] >= MAX_WAITING:
            raise TooFast(max(wait_s, AT_ONCE_S), time.time())
        self._waiting[key_id] += 1
        try:
            async with self._one:
                result, took_s = await asyncio.to_thread(_timed, work)
        finally:
            self._waiting -= Counter([key_id])
        now = time.monotonic()
        since = max(self._within_share_at.get(key_id, now), now)
        self._within_share_at[key_id] = since + took_s / SHARE
        return result


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result, and CPU seconds of this thread."""
    began = time.thread_time()
    return work(), time.thread_time() - began
