"""Limits on open connections, per address and in all. Over a limit, the client that has kept us
waiting longest is cut for the new one.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from imaged.gateway.transport.body_limit import BODY_S

SWEEP_S = 0.5


@dataclass(frozen=True)
class Limits:
    """Limits of one server; *_s are seconds."""

    connections: int = 4000
    per_address: int = 1000
    headers_s: float = 10.0  # from the first byte, or from connecting, to the last header
    body_s: float = BODY_S + 5  # the app answers 408 first
    send_s: float = 30.0  # to read an answer, plus a second for every `bytes_per_s`
    bytes_per_s: float = 4096.0
    longest_send_s: float = 120.0  # whatever its size

    def reading_s(self, size: int) -> float:
        """Seconds that a client may take to read `size` bytes."""
        return min(self.send_s + size / self.bytes_per_s, self.longest_send_s)


class Connection(Protocol):
    """What the limiter needs of a connection."""

    address: str  # of the client, without its port
    loop: asyncio.AbstractEventLoop

    def waited_since(self) -> float | None:
        """Since when, in the loop's time, we have waited for the client; None if we do not."""

    def overdue(self, now: float) -> bool:
        """Whether the client has taken longer than it may."""

    def cut(self) -> None:
        """Close it at once."""


class ConnectionLimiter:
    """The open connections of one server, by address."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._open: dict[str, set[Connection]] = {}
        self.count = 0
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, connection: Connection) -> bool:
        """Register a connection, cutting another if need be; False if there is no room."""
        same = self._open.get(connection.address, set())
        if len(same) >= self.limits.per_address and not self._make_room(same):
            return False
        if self.count >= self.limits.connections and not self._make_room(self._all()):
            return False
        self._open.setdefault(connection.address, set()).add(connection)
        self.count += 1
        if self._timer is None:
            self._timer = connection.loop.call_later(SWEEP_S, self._sweep, connection.loop)
        return True

    def leave(self, connection: Connection) -> None:
        """Unregister a connection, if it was registered."""
        same = self._open.get(connection.address)
        if same is not None and connection in same:
            same.discard(connection)
            self.count -= 1
            if not same:
                del self._open[connection.address]

    def _make_room(self, connections: set[Connection]) -> bool:
        waited_for = [(since, c) for c in connections if (since := c.waited_since()) is not None]
        if not waited_for:
            return False
        _, slowest = min(waited_for, key=lambda pair: pair[0])
        self.leave(slowest)
        slowest.cut()
        return True

    def _all(self) -> set[Connection]:
        return {connection for same in self._open.values() for connection in same}

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in self._all():
            if connection.overdue(now):
                connection.cut()
        self._timer = loop.call_later(SWEEP_S, self._sweep, loop) if self.count else None
