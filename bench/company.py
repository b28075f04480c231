"""What else ran on the machine while something was measured."""

from __future__ import annotations

import os
from pathlib import Path

TICKS_S = os.sysconf("SC_CLK_TCK")
LOUD = 0.05  # of the machine's CPU time: more of it in other hands spoils figures


class Company:
    """From its making on: what others took of the machine's CPU time, the host included.

    Processes of ours count as ours once they have ended and were waited for.
    """

    def __init__(self) -> None:
        self._busy, self._all = _machine()
        self._ours = _ours()

    def others_s(self) -> float:
        """Seconds of a core."""
        return max(0.0, _machine()[0] - self._busy - (_ours() - self._ours))

    def share(self) -> float:
        """Of all that the cores had to give."""
        return self.others_s() / max(_machine()[1] - self._all, 1 / TICKS_S)


def _machine() -> tuple[float, float]:
    """Seconds since it was started in which its cores were busy or taken away, and all."""
    line = Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, idle, waiting, *more = (int(n) / TICKS_S for n in line.split()[1:9])
    busy = user + nice + system + sum(more)  # interrupts, and what the host gave to others
    return busy, busy + idle + waiting


def _ours() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
