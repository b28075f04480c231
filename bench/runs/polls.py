"""What a status poll costs the server: the load that waiting clients make."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import httpx

from bench.app import Effort, effort_options, main
from bench.figures import Row, publish
from bench.rounds import compare, each_round
from bench.sides.servers import environment, free_port, imaged, running
from imaged.catalogue.model import DEFAULT_SLUG

CONNECTIONS = 64
JOBS = 64  # that are asked about in turns
POLLS_A_SECOND = 1000
STEPS = 60  # of the job that is made meanwhile
TARGETS = {"raw": 0.7, "fastapi": 4.0}
NAMES = {"raw": "plain ASGI, bytes made beforehand", "fastapi": "FastAPI with a response model"}
TICKS_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Polled:
    """A running server, and the polls that it is sent: a script for wrk."""

    pid: int
    url: str
    script: Path
    key: str = ""

    def core_rate(self, seconds: float) -> float:
        """Polls for each second of the server's CPU time, from 64 connections at once."""
        before = self._cpu_s()
        with self.polls(CONNECTIONS, max(1, round(seconds))) as load:
            made = answered(load)
        return made / (self._cpu_s() - before)

    @contextmanager
    def polls(self, connections: int, seconds: int) -> Iterator[subprocess.Popen[str]]:
        """wrk under way; ended with the block if it has not ended before."""
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(self.script)]
        command += ["-H", f"x-api-key: {self.key}", self.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as load:
            try:
                yield load
            finally:
                load.send_signal(signal.SIGINT)  # it stops and reports
                load.wait(30)

    def _cpu_s(self) -> float:
        """Of all threads, in and below the kernel."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_S


def answered(load: subprocess.Popen[str]) -> int:
    """How many polls wrk made; raises if one was not answered as it should be."""
    output = load.communicate()[0]
    made = re.search(r"(\d+) requests in", output)
    if made is None or "Non-2xx" in output:
        raise click.ClickException(f"the polls failed: {output}")
    return int(made[1])


def script(folder: Path, name: str, paths: list[str], pause_ms: int = 0) -> Path:
    """For wrk: these paths in turns; each connection pauses so long between two."""
    listed = ", ".join(f'"{path}"' for path in paths)
    lines = [
        f"local paths, n = {{{listed}}}, 0",
        "request = function()",
        "  n = n % #paths + 1",
        '  return wrk.format("GET", paths[n])',
        "end",
    ]
    if pause_ms:
        lines.append(f"delay = function() return {pause_ms} end")
    file = folder / f"{name}.lua"
    file.write_text("\n".join(lines) + "\n")
    return file


@main.command()
@effort_options(rounds=9, seconds=1)
def polls(effort: Effort) -> None:
    """Status polls for each second of a core: ours against the least and the usual server.

    Ours is the truth of the store, read again whenever anyone has written to it; the peers answer
    a fixed text of the same size, one as plain ASGI under the same server, one as FastAPI with a
    response model. The targets are 0.7 and 4. Then how much longer one job takes while 1,000 polls
    a second are answered, its worker on one thread, on a machine of at least two cores: 5 % at
    most. Wants the load generator wrk (a Debian package).
    """
    import torch

    from bench.ceiling import ceilings

    if shutil.which("wrk") is None:
        raise click.ClickException("wrk is not installed: apt-get install wrk")
    found = ceilings(torch.device("cpu"))
    rows = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        data = Path(folder)
        ours = waiting_jobs(stack.enter_context(our_server(data)), data)
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
    rows.append(_beside_a_job(effort))
    publish("polls", effort, rows, found)


def _beside_a_job(effort: Effort) -> Row:
    """One job's seconds in the engine, with polls and without."""
    connections = 8
    with tempfile.TemporaryDirectory() as folder, our_server(Path(folder), workers=1) as server:
        server.take(effort.choose(STEPS, 20))  # warm
        pause_ms = 1000 * connections // POLLS_A_SECOND - 1  # and about one for the answer
        server.finish(done := server.submit(20))
        file = script(Path(folder), "steady", [server.status(done)], pause_ms)
        polled = Polled(server.pid, server.url, file, server.key)
        rates = []

        def beside(_: int) -> float:
            with polled.polls(connections, 600) as load:
                started = time.perf_counter()
                seconds = server.take(effort.choose(STEPS, 20))
                load.send_signal(signal.SIGINT)
                rates.append(answered(load) / (time.perf_counter() - started))
            return seconds

        pair = compare(
            beside,
            lambda _: server.take(effort.choose(STEPS, 20)),
            effort.rounds,
            "beside a job",
        )
    rate = sorted(rates)[len(rates) // 2]
    what = f"one job while {rate:.0f} polls a second are answered"
    return Row.of(what, "s", "lower", "without polls", pair, 1 / 1.05)


@dataclass(frozen=True)
class Gateway:
    """A running server of ours."""

    pid: int
    url: str
    key: str

    def submit(self, steps: int) -> str:
        """The id of a job."""
        body = {"prompt": "a house", "num_inference_steps": steps, "seed": 1}
        body |= {"img_width": 512, "img_height": 512}
        headers = {"x-api-key": self.key}
        answer = httpx.post(f"{self.url}/v2/{DEFAULT_SLUG}", json=body, headers=headers)
        return str(answer.json()["request_id"])

    def status(self, job_id: str) -> str:
        return f"/v2/requests/{job_id}/status"

    def take(self, steps: int) -> float:
        """Seconds that the engine takes for one job."""
        return self.finish(self.submit(steps))

    def finish(self, job_id: str) -> float:
        """Wait for a job; the seconds that the engine took."""
        url = f"{self.url}{self.status(job_id)}?wait=60"
        while True:
            body = httpx.get(url, headers={"x-api-key": self.key}, timeout=90).json()
            if body["status"] in ("COMPLETED", "FAILED"):
                return float(body["metrics"]["inference_time"])


@contextmanager
def our_server(data: Path, workers: int = 0) -> Iterator[Gateway]:
    """Its workers have one thread each."""
    where = ("--data", str(data / "imaged"))
    rich = ("--credits", "1000", "--rpm", "100000")
    key = imaged("keys", "create", *rich, *where, threads=1)
    port = free_port()
    command = ["-m", "imaged", "serve", *where, "--port", str(port), "--workers", str(workers)]
    path = "/readyz" if workers else "/livez"
    environ = environment(1, IMAGED_THREADS="1")
    with running(command, environ, port, path, data / "imaged.log") as process:
        yield Gateway(process.pid, f"http://127.0.0.1:{port}", key)


def waiting_jobs(server: Gateway, folder: Path) -> Polled:
    """Polls about jobs that wait in the queue of a server without workers."""
    paths = [server.status(server.submit(20)) for _ in range(JOBS)]
    return Polled(server.pid, server.url, script(folder, "imaged", paths), server.key)


@contextmanager
def peer_server(which: str, data: Path) -> Iterator[Polled]:
    port = free_port()
    paths = [f"/v2/requests/{n:032x}/status" for n in range(JOBS)]
    command = ["-m", "bench.sides.peer_polls", which, "--port", str(port)]
    with running(command, environment(1), port, paths[0], data / f"{which}.log") as process:
        yield Polled(process.pid, f"http://127.0.0.1:{port}", script(data, which, paths))
