"""Calls that wait: for whom they stop waiting, and what they say when they have to."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imaged.gateway.wait import Board
from tests.conftest import SLUG
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
    """When anybody who waits looked at a job."""
    seen: list[float] = []
    right = Board.tick

    async def tick(self: Board) -> None:
        seen.append(time.monotonic())
        await right(self)

    monkeypatch.setattr(Board, "tick", tick)
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
        until(lambda: len(seen) > 3)
    time.sleep(1.0)
    seen.clear()
    time.sleep(0.5)
    assert not seen
    with own.client() as client:  # and yet the job goes on
        rows = client.get("/inference-request/request-history").json()["data"]
    assert [row["model_status"] for row in rows] == ["PENDING"]


def until(true: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
