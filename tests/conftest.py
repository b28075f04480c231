"""Shared fixtures: the real checkpoint, a real store in a temporary folder, a real server."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import click.testing
import httpx
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

hypothesis_settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)  # a busy machine is no failure, and a failure repeats
hypothesis_settings.load_profile("steady")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # beside servers, waiting threads must not spin
if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
for name in [n for n in os.environ if n.startswith(("IMAGED_", "SEGMIND_"))]:
    del os.environ[name]  # a developer's own settings must not decide a test

SLUG = "sdxl1.0-yamers-realistic"
QUICK: dict[str, Any] = {
    "prompt": "a green prairie under a blue sky",
    "num_inference_steps": 6,  # as few and small as servers in tests take, see few_steps.toml
    "img_width": 256,
    "img_height": 256,
}
FEW_STEPS = Path(__file__).parent / "few_steps.toml"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What asks the shared server comes first: of two processes only one needs to start one."""
    items.sort(key=lambda item: "server" not in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def nets() -> Any:
    """The shipped checkpoint on the CPU."""
    import torch

    from imaged.catalogue.model import MICRO
    from imaged.engine.loading.load import load

    return load(MICRO, torch.device("cpu"))


@pytest.fixture(scope="session")
def theirs() -> Any:
    """The same checkpoint in the reference libraries' nets: their own SDXL pipeline."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    from imaged.catalogue.model import MICRO

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        MICRO, local_files_only=True, use_safetensors=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(torch.float32)
    for net in (pipeline.unet, pipeline.vae):
        net.to(memory_format=torch.channels_last)  # as ours are: another layout rounds otherwise
    return pipeline


@cache
def schema() -> bytes:
    """A store with the current schema and nothing in it: migrations cost more than most tests."""
    from imaged.store.sql.database import Database

    with TemporaryDirectory() as folder:
        file = Path(folder) / "imaged.db"
        database = Database(f"sqlite:///{file}")
        database.migrate()
        database.close()
        return file.read_bytes()


def store(file: Path) -> Any:
    """The store in this file, which has the current schema if it is new."""
    from imaged.store.sql.database import Database

    if not file.exists():
        file.write_bytes(schema())
    return Database(f"sqlite:///{file}")


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Any]:
    """A fresh store with the current schema."""
    database = store(tmp_path / "imaged.db")
    yield database
    database.close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    """A small HTTP server on a free port of its own; clients that hang up are no error."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


Found = TypeVar("Found")


def never() -> object:
    return "it never came true"


def until(
    true: Callable[[], Found | None],
    limit_s: float = 120,
    *,
    every_s: float = 0.02,
    say: Callable[[], object] = never,
) -> Found:
    """Wait for a condition, however busy the machine is; what came true is returned.

    say: what a failure should tell, asked when it fails.
    """
    deadline = time.monotonic() + limit_s
    while not (found := true()):
        assert time.monotonic() < deadline, say()
        time.sleep(every_s)
    return found


async def until_async(
    true: Callable[[], Found | None],
    limit_s: float = 120,
    *,
    every_s: float = 0.02,
    say: Callable[[], object] = never,
) -> Found:
    """The same within a loop, which goes on meanwhile."""
    deadline = time.monotonic() + limit_s
    while not (found := true()):
        assert time.monotonic() < deadline, say()
        await asyncio.sleep(every_s)
    return found


def cli(*args: str, cwd: Path | str = ".", **given: Any) -> click.testing.Result:
    """Run the command line in this process, without the second that another takes to begin."""
    from imaged.cli import main

    with chdir(cwd):
        return click.testing.CliRunner().invoke(main, args, **given)


def imaged(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as a person would, where 8000 may be taken."""
    kwargs["env"] = {"IMAGED_PORT": str(free_port()), **kwargs.get("env", os.environ)}
    return subprocess.run(
        [sys.executable, "-m", "imaged", *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **kwargs,
    )


@dataclass
class Server:
    """`imaged serve` as its own process group on a free port."""

    data: Path
    port: int = field(default_factory=free_port)
    environ: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def key(self) -> str:
        return (self.data / "first-key").read_text().strip()

    def start(self, ready: bool = True) -> Server:
        command = [sys.executable, "-m", "imaged", "serve", "--data", str(self.data)]
        own = (self.data / "models.toml").exists()
        few = {} if own else {"IMAGED_MODELS": str(FEW_STEPS)}
        with (self.data.parent / f"{self.data.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                env={**os.environ, **few, **self.environ},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait_until("readyz" if ready else "livez")
        return self

    def wait_until(self, path: str, limit_s: float = 120) -> None:
        """Until this path of the server's health is answered with 200."""

        def answered() -> bool:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/{path}", timeout=30).status_code == 200:
                    return True
            assert self.running, self.log
            return False

        def say() -> str:
            return f"no {path} after {limit_s} s: {self.log}"

        until(answered, limit_s, every_s=0.1, say=say)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> str:
        return (self.data.parent / f"{self.data.name}.log").read_text(errors="replace")[-4000:]

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill_everything(self) -> None:
        """SIGKILL to the server and to its workers, all that this fixture started."""
        assert self.process is not None
        pids = [*self.worker_pids(), self.process.pid]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def worker_pids(self) -> list[int]:
        """The worker processes of this server, from their parent's pid."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        listed = {int(pid) for pid in children.read_text().split()}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():  # any thread may fork
            listed |= {int(pid) for pid in (task / "children").read_text().split()}
        return sorted(listed)

    def client(self, key: str | None = None) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"x-api-key": key or self.key}, timeout=120)

    def states(self) -> dict[str, str]:
        """What is said of each model's checkpoint, which a worker tells once a second."""
        with self.client() as client:
            return {m["slug"]: m["state"] for m in client.get("/v1/models").json()["models"]}

    def submit(self, slug: str = SLUG, **params: Any) -> str:
        with self.client() as client:
            answer = client.post(f"/v2/{slug}", json={**QUICK, **params})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    def wait(self, job_id: str, limit_s: float = 120) -> dict[str, Any]:
        """The status body once the job has ended."""
        body: dict[str, Any] = {}

        def ended() -> dict[str, Any] | None:
            nonlocal body
            with suppress(httpx.TransportError):  # the server may be on its way back
                body = client.get(f"/v2/requests/{job_id}/status").json()
                return body if body["status"] in ("COMPLETED", "FAILED") else None
            return None

        def say() -> str:
            return f"job did not end: {body} {self.log}"

        with self.client() as client:
            return until(ended, limit_s, every_s=0.1, say=say)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that do not harm it; webhooks may lead to this machine."""
    environ = {"IMAGED_WEBHOOK_NETWORKS": "127.0.0.0/8,::1/128"}
    running = Server(tmp_path_factory.mktemp("server") / "data", environ=environ).start()
    yield running
    running.stop()
