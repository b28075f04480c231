"""Status polls that are answered from memory: over real sockets they are as any other request."""

from __future__ import annotations

import json
import re
import socket
import time
from typing import Any

import pytest

from imaged.gateway.api.status import Status
from imaged.gateway.transport.response_cache import MAX_REQUEST_BYTES, ResponseCache
from imaged.store.jobs import queue
from tests.conftest import until
from tests.contract.gate import Gate

Answer = tuple[bytes, dict[str, Any]]  # the head and the JSON


class Peer:
    """A client that sends bytes and reads whole answers."""

    def __init__(self, gate: Gate) -> None:
        self._socket = socket.create_connection(("127.0.0.1", gate.settings.port), timeout=60)
        self._unread = b""

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, content: bytes) -> Answer:
        self.send(content)
        return self.read()

    def send(self, content: bytes) -> None:
        self._socket.sendall(content)

    def read(self) -> Answer:
        while (end := self._unread.find(b"\r\n\r\n")) < 0:
            self._more()
        head, start = self._unread[:end], end + 4
        size = int(re.findall(rb"content-length: (\d+)", head)[0])
        while len(self._unread) < start + size:
            self._more()
        body, self._unread = self._unread[start : start + size], self._unread[start + size :]
        return head, json.loads(body)

    def ended(self) -> bool:
        return self._socket.recv(1) == b""

    def _more(self) -> None:
        got = self._socket.recv(65536)
        assert got, "the server hung up"
        self._unread += got


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs that the app has read for a poll; what is answered from memory is not among them."""
    seen: list[str] = []
    right = Status._read

    async def read(self: Status, job_id: str, *more: Any) -> Any:
        seen.append(job_id)
        return await right(self, job_id, *more)

    monkeypatch.setattr(Status, "_read", read)
    return seen


def running(gate: Gate) -> str:
    """A job that a worker has in hand and that stays as it is."""
    job_id = gate.submit("run")
    with gate.client() as client:
        path = f"/v2/requests/{job_id}"
        until(lambda: client.get(path).json()["status"] != "QUEUED", every_s=0.01)
    return job_id


def poll(gate: Gate, job_id: str, *headers: str) -> bytes:
    lines = [f"GET /v2/requests/{job_id}/status HTTP/1.1", "host: here", *headers]
    return "\r\n".join([*lines, f"x-api-key: {gate.key}", "", ""]).encode()


def remembered(peer: Peer, content: bytes, reads: list[str]) -> Answer:
    """An answer from memory: the gateway's chores may write in between, but not every time."""
    for _ in range(20):
        before = len(reads)
        answer = peer.ask(content)
        if len(reads) == before:
            return answer
    raise AssertionError("the app was asked every time")


def test_the_same_question_has_the_same_answer(gate: Gate, reads: list[str]) -> None:
    """On this connection and on a new one, whose first request it is."""
    job_id = running(gate)
    with Peer(gate) as peer, Peer(gate) as other:
        first = peer.ask(poll(gate, job_id))
        again = remembered(peer, poll(gate, job_id), reads)
        assert remembered(other, poll(gate, job_id), reads) == again
    dateless = [re.sub(rb"date: .*", b"", head) for head, _ in (first, again)]
    assert (
        dateless[0] == dateless[1] and first[1] == again[1] and first[1]["status"] == "PROCESSING"
    )
    assert b"x-safety: " in again[0]


def test_what_has_happened_is_seen_at_once(gate: Gate, reads: list[str]) -> None:
    job_id = running(gate)
    with Peer(gate) as peer, gate.client() as client:
        assert remembered(peer, poll(gate, job_id), reads)[1]["status"] == "PROCESSING"
        client.delete(f"/v2/requests/{job_id}")
        assert peer.ask(poll(gate, job_id))[1]["status"] == "FAILED"


def test_other_requests_go_on_between(gate: Gate, reads: list[str]) -> None:
    """Polls from memory leave the connection as it was for those that are parsed."""
    asked, others = poll(gate, running(gate)), b"GET /livez HTTP/1.1\r\nhost: here\r\n\r\n"
    with Peer(gate) as peer:
        kept = remembered(peer, asked, reads)
        for _ in range(3):
            assert b" 200 " in peer.ask(others)[0]
            assert peer.ask(asked)[1] == kept[1]
            peer.send(others[:10])
            peer.send(others[10:])
            assert b" 200 " in peer.read()[0]


@pytest.mark.parametrize("order", ["kept first", "kept last", "kept twice", "kept in the middle"])
def test_requests_in_one_breath_are_answered_in_order(
    gate: Gate, reads: list[str], order: str
) -> None:
    jobs = [running(gate) for _ in range(3)]
    a, b, c = (poll(gate, job_id) for job_id in jobs)
    asked = {"kept first": [a, b], "kept last": [b, a], "kept twice": [a, a], "": []}
    with Peer(gate) as peer:
        remembered(peer, a, reads)
        for _ in range(3):
            sent = asked.get(order, [b, a, c])
            peer.send(b"".join(sent))
            answers = [peer.read()[1]["request_id"] for _ in sent]
            assert answers == [jobs[[a, b, c].index(one)] for one in sent]


def test_half_a_question_is_no_question(gate: Gate, reads: list[str]) -> None:
    """What was sent in two pieces is not kept under the last of them."""
    job_id = running(gate)
    content = poll(gate, job_id)
    with Peer(gate) as peer:
        for cut in (1, 30, len(content) - 2):
            peer.send(content[:cut])
            time.sleep(0.05)
            peer.send(content[cut:])
            assert peer.read()[1]["request_id"] == job_id
        remembered(peer, content, reads)
        peer.send(content[:30])
        assert peer.ask(content[30:])[1]["request_id"] == job_id


def test_rubbish_after_a_question_is_refused_every_time(gate: Gate) -> None:
    content = poll(gate, running(gate)) + b"\x00\x01\r\n\r\n"
    for _ in range(4):
        with Peer(gate) as peer:
            peer.send(content)
            assert peer._socket.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_who_wants_the_connection_closed_has_it_closed(gate: Gate, reads: list[str]) -> None:
    job_id = running(gate)
    for _ in range(4):
        with Peer(gate) as peer:
            assert b"connection: close" in peer.ask(poll(gate, job_id, "connection: close"))[0]
            assert peer.ended()
    assert reads.count(job_id) == 4


def test_a_scheme_that_a_proxy_names_is_not_told_to_others(gate: Gate, reads: list[str]) -> None:
    job_id = running(gate)
    with Peer(gate) as peer:
        for _ in range(2):
            for headers, scheme in ((("x-forwarded-proto: https",), "https:"), ((), "http:")):
                body = remembered(peer, poll(gate, job_id, *headers), reads)[1]
                assert body["status_url"].startswith(scheme)


def test_long_questions_and_those_that_wait_are_the_apps(gate: Gate, reads: list[str]) -> None:
    job_id = running(gate)
    waiting = poll(gate, job_id).replace(b"/status", b"/status?wait=0.01")
    with Peer(gate) as peer:
        for content in (waiting, poll(gate, job_id, "x-long: " + "a" * MAX_REQUEST_BYTES)):
            for _ in range(3):
                peer.ask(content)
    assert reads.count(job_id) == 6


def test_mutant_that_does_not_look(
    gate: Gate, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the store not looked at, what has happened would not be seen."""
    job_id = running(gate)
    with Peer(gate) as peer:
        remembered(peer, poll(gate, job_id), reads)
        monkeypatch.setattr(ResponseCache, "check", lambda self: None)
        with gate.database.write() as c:
            queue.cancel(c, job_id, 0.0, 60.0)
        assert peer.ask(poll(gate, job_id))[1]["status"] == "PROCESSING"
