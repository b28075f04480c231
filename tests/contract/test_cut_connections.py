"""Clients that hang up while they are answered: the server is quiet about it, and goes on."""

from __future__ import annotations

import gc
import json
import logging
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from imaged.gateway.read import job_reader
from tests.conftest import until
from tests.contract.gate import Gate
from tests.contract.hostile_routes import OPENAI, SDAPI

AT_ONCE = struct.pack("ii", 1, 0)  # for SO_LINGER: close resets the connection
RUN = json.dumps({"prompt": "run"}).encode()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    data = tmp_path_factory.mktemp("cut") / "data"
    data.mkdir()
    with Gate(data).running() as running:
        yield running


@contextmanager
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Warnings, errors and tracebacks of the server's loggers within the block."""
    loggers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error")]
    found: list[str] = []
    for logger in loggers:
        logger.addHandler(caplog.handler)  # they do not propagate
    caplog.clear()
    try:
        yield found
        gc.collect()  # a task nobody waited for tells of its exception only now
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)
    bad = [r for r in caplog.records if r.levelno >= logging.WARNING or r.exc_info]
    found += [f"{r.name}: {r.getMessage()}" for r in bad if not r.name.startswith("httpx")]


def request(gate: Gate, line: str, body: bytes = b"", *, size: int | None = None) -> bytes:
    lines = [f"{line} HTTP/1.1", "host: x", f"x-api-key: {gate.key}"]
    lines += [f"authorization: Bearer {gate.key}", "content-type: application/json"]
    lines += [f"content-length: {size or len(body)}"] if body else []
    return "\r\n".join([*lines, "", ""]).encode() + body


def file(gate: Gate) -> bytes:
    """More of a picture than a socket holds, asked for in one breath."""
    job_id = gate.submit()
    assert gate.wait_for_end(job_id).is_success
    with gate.client() as client:
        url = urlsplit(client.get(f"/v2/requests/{job_id}").json()["output"])
    return request(gate, f"GET {url.path}?{url.query}") * 300


CALLS: dict[str, Callable[[Gate], bytes]] = {
    "v1 waits": lambda gate: request(gate, f"POST /v1/{gate.slug}", RUN),
    "OpenAI's waits": lambda gate: request(gate, f"POST {OPENAI}", RUN),
    "A1111's waits": lambda gate: request(gate, f"POST {SDAPI}", RUN),
    "long poll": lambda gate: request(
        gate, f"GET /v2/requests/{gate.submit('run')}/status?wait=60"
    ),
    "events": lambda gate: request(gate, f"GET /v2/requests/{gate.submit('run')}/events"),
    "file": file,
    "half a body": lambda gate: request(gate, f"POST /v1/{gate.slug}", RUN, size=1000),
    "half a head": lambda gate: request(gate, f"POST /v1/{gate.slug}")[:-4],
    "polls": lambda gate: request(gate, f"GET /v2/requests/{gate.submit('run')}/status") * 300,
}


def cut(gate: Gate, content: bytes, *, reset: bool, after_s: float) -> None:
    """Ask, read nothing or little, and go."""
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(("127.0.0.1", gate.settings.port))
        if reset:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
        peer.sendall(content)
        time.sleep(after_s)


def let_go(gate: Gate) -> bool:
    """Whether the server has let go of every connection."""
    return not gate.limiter.count


def complaints(gate: Gate, call: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the server logs when this call is cut, in either way, at once and later."""
    content = CALLS[call](gate)
    until(lambda: let_go(gate))
    with logged(caplog) as found:
        ways = list(product((False, True), (0.0, 0.02, 0.3)))
        with ThreadPoolExecutor(len(ways)) as pool:
            list(pool.map(lambda way: cut(gate, content, reset=way[0], after_s=way[1]), ways))
        until(lambda: let_go(gate))
        time.sleep(0.2)  # for what the app still does with nobody there
        assert httpx.get(f"{gate.url}/livez").is_success
    return found


@pytest.mark.parametrize("call", CALLS)
def test_who_hangs_up_leaves_no_trace(
    own: Gate, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert complaints(own, call, caplog) == []


def test_mutant_that_complains(
    own: Gate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Did waiting end with an exception when its caller hangs up, it would be in the log."""
    right = job_reader.JobReader.wait_for_end

    async def wait_for_end(
        self: job_reader.JobReader, key: Any, job_id: str, wait_s: float, receive: Any
    ) -> Any:
        job = await right(self, key, job_id, wait_s, receive)
        if not job.state.final:
            raise ConnectionResetError("the caller has gone")
        return job

    monkeypatch.setattr(job_reader.JobReader, "wait_for_end", wait_for_end)
    assert any("unexpected" in line for line in complaints(own, "v1 waits", caplog))
