"""Calls that wait: for whom they stop waiting, and what they say when they have to."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from imaged.gateway.read.job_watcher import JobWatcher
from imaged.store.jobs import queue
from tests.conftest import SLUG, until
from tests.contract.gate import Gate

WORKS = (f"/v1/{SLUG}", "/openai/v1/images/generations", "/sdapi/v1/txt2img")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Gate]:
    """A gateway in which nobody else waits."""
    (tmp_path / "data").mkdir()
    with Gate(tmp_path / "data").running() as running:
        yield running


def say(gate: Gate, head: str, body: bytes = b"") -> socket.socket:
    """An open connection that has sent one request."""
    peer = socket.create_connection(("127.0.0.1", gate.settings.port), timeout=5)
    lines = [head, "host: x", f"x-api-key: {gate.key}", "content-type: application/json"]
    lines += [f"content-length: {len(body)}"] if body else []
    peer.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return peer


def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When it was looked at the store for those who wait."""
    seen: list[float] = []
    right = JobWatcher._poll

    async def look(self: JobWatcher) -> float:
        seen.append(time.monotonic())
        return await right(self)

    monkeypatch.setattr(JobWatcher, "_poll", look)
    return seen


@pytest.mark.parametrize("path", ["status", *WORKS])
def test_nobody_waits_for_a_caller_who_hung_up(
    own: Gate, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    seen = looks(monkeypatch)
    if path == "status":
        peer = say(own, f"GET /v2/requests/{own.submit('run')}/status?wait=60 HTTP/1.1")
    else:
        peer = say(own, f"POST {path} HTTP/1.1", json.dumps({"prompt": "run"}).encode())
    with peer:
        until(lambda: len(seen) > 3, 20)
    time.sleep(1.0)
    seen.clear()
    time.sleep(0.5)
    assert not seen
    with own.client() as client:  # and yet the job goes on
        rows = client.get("/inference-request/request-history").json()["data"]
    assert [row["model_status"] for row in rows] == ["PENDING"]


def test_a_server_that_stops_lets_those_go_who_wait(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    gate = Gate(tmp_path / "data")
    with ThreadPoolExecutor(len(WORKS) + 1) as pool, gate.running():
        job_id = gate.submit("run")
        polled = pool.submit(ask, gate, "GET", f"/v2/requests/{job_id}/status?wait=60")
        called = [pool.submit(ask, gate, "POST", path) for path in WORKS]
        until(lambda: jobs_of(gate) == 1 + len(WORKS), 20)
        time.sleep(0.5)
    status = polled.result()
    assert status.status_code == 200 and status.json()["status"] == "PROCESSING"
    for answer in (future.result() for future in called):
        assert answer.status_code == 504 and "still running" in answer.text
        assert len(answer.headers["x-request-id"]) == 32


def ask(gate: Gate, method: str, path: str) -> httpx.Response:
    with gate.client() as client:
        return client.request(method, path, json={"prompt": "run"} if method == "POST" else None)


def jobs_of(gate: Gate) -> int:
    with gate.database.read() as c:
        return len(queue.newest(c))
