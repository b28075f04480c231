"""Servers as processes of their own: ours as a user starts it, and the peers'."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import httpx

from bench.code import ROOT
from imaged.catalogue.model import DEFAULT_SLUG
from imaged.params.image_params import ImageParams

READY_S = 300.0
IMAGE_S = 1800.0  # the longest wait for one picture


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(threads: int, **more: str) -> dict[str, str]:
    """Of every process that is measured: the same threads, no network."""
    count = str(threads)
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("IMAGED_")},
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def imaged(*words: str, threads: int) -> str:
    """Run a command of ours to its end; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "imaged", *words],
        cwd=ROOT,
        env=environment(threads),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(f"imaged {words[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


@dataclass(frozen=True)
class Imaged:
    """A running `imaged serve`; may be called from several threads."""

    client: httpx.Client

    def picture(self, params: ImageParams) -> bytes:
        """One JPEG by one v1 call."""
        answer = self.client.post(f"/v1/{DEFAULT_SLUG}", json=params.as_dict())
        if answer.status_code != 200 or answer.headers["content-type"] != "image/jpeg":
            raise click.ClickException(f"imaged answered {answer.status_code}: {answer.text[:200]}")
        return answer.content


@contextmanager
def imaged_server(
    checkpoint: Path, data: Path, threads: int, slots: int = 8, **more: str
) -> Iterator[Imaged]:
    """Our server with this checkpoint in a fresh data folder, ready; `more` are settings."""
    where = ("--data", str(data))
    imaged("models", "add", DEFAULT_SLUG, "--checkpoint", str(checkpoint), *where, threads=threads)
    rich = ("--credits", "1000000", "--rpm", "1000000")
    key = imaged("keys", "create", *rich, *where, threads=threads)
    port = free_port()
    command = ["-m", "imaged", "serve", *where, "--port", str(port)]
    environ = environment(threads, IMAGED_SLOTS=str(slots), IMAGED_THREADS=str(threads), **more)
    with (
        running(command, environ, port, "/readyz", data / "server.log"),
        _client(port, {"x-api-key": key}) as client,
    ):
        yield Imaged(client)


@dataclass(frozen=True)
class Locked:
    """A running bench.sides.peer_lock."""

    client: httpx.Client

    def picture(self, params: ImageParams) -> bytes:
        return _good(self.client.post("/generate", json=params.as_dict())).content


@contextmanager
def lock_server(
    checkpoint: Path, data: Path, threads: int, device: str = "cpu"
) -> Iterator[Locked]:
    port = free_port()
    command = ["-m", "bench.sides.peer_lock", "--checkpoint", str(checkpoint), "--port", str(port)]
    command += ["--device", device]
    log = data / "peer-lock.log"
    with running(command, environment(threads), port, "/ready", log), _client(port) as client:
        yield Locked(client)


@dataclass(frozen=True)
class Async:
    """A running examples/server-async of diffusers.

    Its API takes a prompt and a number of steps; sampler, guidance, size and seed are its own.
    """

    client: httpx.Client

    def picture(self, params: ImageParams) -> bytes:
        body = {"prompt": params.prompt, "num_inference_steps": params.num_inference_steps}
        answer = _good(self.client.post("/api/diffusers/inference", json=body)).json()
        name = answer["response"][0].rsplit("/", 1)[1]
        return _good(self.client.get(f"/images/{name}")).content


@contextmanager
def async_server(
    diffusers: Path, checkpoint: Path, data: Path, threads: int, device: str = "cpu"
) -> Iterator[Async]:
    """The example from a clone of diffusers, which is not changed."""
    port = free_port()
    command = ["-m", "bench.sides.peer_async", "--diffusers", str(diffusers)]
    command += ["--checkpoint", str(checkpoint), "--port", str(port), "--device", device]
    environ = environment(threads, TMPDIR=str(data))  # it keeps its pictures there
    log = data / "peer-async.log"
    with running(command, environ, port, "/", log), _client(port) as client:
        yield Async(client)


@contextmanager
def running(
    command: list[str], environ: dict[str, str], port: int, path: str, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process from its start until it answers, and to its end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environ, stdout=out, stderr=out
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}{path}", log)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise click.ClickException(f"no server at {url}: {log.read_text(errors='replace')[-2000:]}")


def _client(port: int, headers: dict[str, str] | None = None) -> httpx.Client:
    limits = httpx.Limits(max_connections=64)
    url = f"http://127.0.0.1:{port}"
    return httpx.Client(base_url=url, headers=headers, timeout=IMAGE_S, limits=limits)


def _good(answer: httpx.Response) -> httpx.Response:
    if answer.status_code != 200:
        raise click.ClickException(f"the peer answered {answer.status_code}: {answer.text[:200]}")
    return answer
