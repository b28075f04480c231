"""What a status poll costs the server: the load that waiting clients make."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import httpx

from bench.app import Effort, effort_options, main
from bench.figures import Row, publish
from bench.rounds import compare, each_round
from bench.servers import environment, free_port, imaged, running
from imaged.catalogue import DEFAULT_SLUG

CONNECTIONS = 64
TARGETS = {"raw": 0.7, "fastapi": 4.0}
NAMES = {"raw": "plain ASGI, bytes made beforehand", "fastapi": "FastAPI with a response model"}
TICKS_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Polled:
    """A running server, and the poll that it is sent."""

    pid: int
    url: str
    key: str = ""

    def core_rate(self, seconds: float) -> float:
        """Polls for each second of the server's CPU time, from 64 connections at once."""
        before = self._cpu_s()
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{max(1, round(seconds))}s"]
        done = subprocess.run(
            [*command, "-H", f"x-api-key: {self.key}", self.url],
            capture_output=True,
            text=True,
            check=True,
        )
        made = re.search(r"(\d+) requests in", done.stdout)
        if made is None or "Non-2xx" in done.stdout:
            raise click.ClickException(f"the polls failed: {done.stdout}")
        return int(made[1]) / (self._cpu_s() - before)

    def _cpu_s(self) -> float:
        """Of all threads, in and below the kernel."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_S


@main.command()
@effort_options
def polls(effort: Effort) -> None:
    """Status polls for each second of a core: ours against the least and the usual server.

    Ours reads the key and the job's row from the store; the peers answer a fixed text of the same
    size, one as plain ASGI under the same server, one as FastAPI with a response model. The
    targets are 0.7 and 4. Wants the load generator wrk (a Debian package).
    """
    import torch

    from bench.ceiling import ceilings

    if shutil.which("wrk") is None:
        raise click.ClickException("wrk is not installed: apt-get install wrk")
    found = ceilings(torch.device("cpu"))
    rows = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        data = Path(folder)
        ours = stack.enter_context(our_server(data))
        for which, target in TARGETS.items():
            peer = stack.enter_context(peer_server(which, data))
            for side in (ours, peer):
                side.core_rate(1)  # warm
            pair = compare(
                each_round(ours.core_rate, effort.seconds),
                each_round(peer.core_rate, effort.seconds),
                effort.rounds,
                which,
            )
            what = "status polls for a second of a core"
            rows.append(Row.of(what, "polls", "higher", NAMES[which], pair, target))
    publish("polls", effort, rows, found)


@contextmanager
def our_server(data: Path) -> Iterator[Polled]:
    """A gateway without workers, and a job that waits in its queue."""
    where = ("--data", str(data / "imaged"))
    key = imaged("keys", "create", "--credits", "10", *where, threads=1)
    port = free_port()
    command = ["-m", "imaged", "serve", *where, "--port", str(port), "--workers", "0"]
    with running(command, environment(1), port, "/livez", data / "imaged.log") as process:
        url = f"http://127.0.0.1:{port}/v2"
        answer = httpx.post(
            f"{url}/{DEFAULT_SLUG}", json={"prompt": "a house"}, headers={"x-api-key": key}
        )
        yield Polled(process.pid, answer.json()["status_url"], key)


@contextmanager
def peer_server(which: str, data: Path) -> Iterator[Polled]:
    port, path = free_port(), f"/v2/requests/{'0' * 32}/status"
    command = ["-m", "bench.peer_polls", which, "--port", str(port)]
    with running(command, environment(1), port, path, data / f"{which}.log") as process:
        yield Polled(process.pid, f"http://127.0.0.1:{port}{path}")
