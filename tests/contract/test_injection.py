"""Line ends in values that could reach a header: no answer has a header that was smuggled in."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest
from uvicorn.protocols.http import httptools_impl

from imaged.gateway.present import bodies
from imaged.worker.deliver import Stamp
from tests.contract import gate as module
from tests.contract.gate import Gate
from tests.contract.hostile_routes import OPENAI, SDAPI
from tests.mutants import red

EVIL = "x\r\nx-evil: 1\r\n\r\n<html>"
ESCAPED = quote(EVIL, safe="")
SMALL = {"prompt": "x", "img_width": 512, "img_height": 512}
PATHS = [
    *(f"/{ESCAPED}", f"/files/{ESCAPED}", f"/v1/requests/{ESCAPED}", f"/v2/requests/{ESCAPED}"),
    *(f"/v2/requests/{ESCAPED}/status", f"/v2/requests/{ESCAPED}/events", f"/livez?{ESCAPED}"),
    *(f"/openai/v1/models/{ESCAPED}", f"/webhook/inactive?webhook_id={ESCAPED}"),
    *(f"/inference-request/request-history/{ESCAPED}", f"/files/x?exp={ESCAPED}&sig={ESCAPED}"),
    *(
        f"/inference-request/generations?model_name={ESCAPED}",
        f"/v2/requests/x/status?wait={ESCAPED}",
    ),
]


def cases(slug: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every text that a caller may choose, at every route that takes one."""
    for path in (f"/v1/{slug}", f"/v2/{slug}", f"/v2/{ESCAPED}"):
        for name in ("prompt", "negative_prompt", "scheduler", "output_format", EVIL):
            yield path, {**SMALL, name: EVIL}
    for name in ("prompt", "model", "size", "response_format", "user"):
        yield OPENAI, {"prompt": "x", "size": "512x512", name: EVIL}
    for name in ("prompt", "sampler_name", "scheduler", "styles"):
        yield SDAPI, {"prompt": "x", name: EVIL}
    for name in ("webhook_url", "webhook_id", "event"):
        event = {"types": ["GENERATION"]}
        hook = {"webhook_url": "https://example.com/", "webhook_id": "x", "event": event}
        yield "/webhook/update", {**hook, name: EVIL}


def is_clean(answer: httpx.Response) -> bool:
    """Whether no line of its head is of the value's making, and the server is not at fault."""
    smuggled = "x-evil" in answer.headers or b"<html>" in answer.content[:6]
    return answer.status_code < 500 and not smuggled


def test_what_a_caller_sends_makes_no_header(gate: Gate) -> None:
    with gate.client() as client:
        for path in PATHS:
            assert is_clean(client.get(path)), path
        for path, body in cases(gate.slug):
            assert is_clean(client.post(path, json=body)), (path, body)


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n", b"\x00\r\n", b"\r\n "])
@pytest.mark.parametrize("name", [b"host", b"origin", b"idempotency-key", b"x-forwarded-proto"])
def test_what_a_header_holds_makes_no_header(gate: Gate, name: bytes, end: bytes) -> None:
    """A line end in a header that is repeated in answers: refused, or a header of its own."""
    value = name + b": x" + end + b"x-evil: 1"
    head = b"GET /livez HTTP/1.1\r\nconnection: close\r\n" + value + b"\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gate.settings.port), timeout=60) as peer:
        peer.sendall(head)
        answer = b"".join(iter(lambda: peer.recv(65536), b""))
    assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 4")) and b"x-evil" not in answer.lower()


def picture_by(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> httpx.Response:
    """A v1 answer whose picture was made by a checkpoint and a device of that name."""
    monkeypatch.setattr(module, "Stamp", lambda *_: Stamp(EVIL, "exact", EVIL))
    with gate.client() as client:
        return client.post(f"/v1/{gate.slug}", json=SMALL)


def test_what_a_worker_tells_makes_no_header(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a checkpoint is its maker's; it comes whole, and escaped."""
    answer = picture_by(gate, monkeypatch)
    assert answer.status_code == 200 and is_clean(answer)
    assert unquote(answer.headers["x-checkpoint"]) == unquote(answer.headers["x-device"]) == EVIL
    assert set(json.loads(answer.headers["x-output-metadata"])) >= {"width", "images"}


@pytest.mark.slow
def test_mutant_that_does_not_escape(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then uvicorn alone stands between, and there is no picture; without it there is a header."""

    def as_it_is(text: str, **_: Any) -> str:
        return text

    with red(bodies, "quote", as_it_is, raises=httpx.RemoteProtocolError):
        picture_by(gate, monkeypatch)
    monkeypatch.setattr(httptools_impl, "HEADER_VALUE_RE", re.compile(b"(?!)"))
    with red(bodies, "quote", as_it_is):
        assert is_clean(picture_by(gate, monkeypatch))
