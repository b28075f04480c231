"""Slow, silent and many connections; keys that must not be logged."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from imaged.gateway import serve
from imaged.gateway.transport import body_limit, connections, protocol
from imaged.gateway.transport.connections import Limits
from tests.conftest import Server, cli, until
from tests.contract.gate import Gate
from tests.mutants import red

SLOW = 500
HONEST = 300
ROOM = 100
LIMIT_S = 60.0  # for what takes a second where nothing else runs
QUICK = Limits(headers_s=1.0, body_s=1.5, send_s=1.0, bytes_per_s=1.0, longest_send_s=2.0)
ASK = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"
HEAD = b"POST /v2/x HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture
def hasty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gateway with short deadlines and room for 100 connections of an address."""
    monkeypatch.setattr(body_limit, "BODY_S", 1.0)
    yield from limited(tmp_path, monkeypatch, QUICK)


@pytest.fixture
def patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The same with deadlines that no test meets: whoever goes had to make room."""
    long = Limits(headers_s=60.0, body_s=60.0, send_s=60.0)
    yield from limited(tmp_path, monkeypatch, long)


def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: Limits) -> Iterator[Gate]:
    monkeypatch.setattr(
        serve,
        "Limits",
        lambda **caps: dataclasses.replace(
            limits, connections=caps["connections"], per_address=ROOM
        ),
    )
    (tmp_path / "data").mkdir()
    with Gate(tmp_path / "data").running() as running:
        yield running


def connect(gate: Gate) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", gate.settings.port), timeout=LIMIT_S)
    made.setblocking(False)
    return made


def closed(peer: socket.socket, trickle: bytes = b"") -> bool:
    """Whether the server has ended the connection, to which we send a byte more."""
    try:
        if trickle:
            peer.send(trickle)
        return peer.recv(65536) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


SENDERS = [
    (b"", b""),  # says nothing
    (b"", b"\r\n"),  # blank lines for ever
    (b"GET /livez HTTP/1.1\r\nx-a: ", b"a"),  # a header that never ends
    (HEAD + b"content-length: 1000\r\n\r\n", b"a"),  # a body that never ends
    (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
    (b"GET /livez HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n", b"a"),
    (b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n", b"\r\n"),  # after a first, whole request
]


def test_slow_senders_are_cut_off(hasty: Gate) -> None:
    with ExitStack() as stack:
        left = [(stack.enter_context(connect(hasty)), trickle) for _, trickle in SENDERS]
        for (peer, _), (first, _) in zip(left, SENDERS, strict=True):
            peer.send(first)

        def all_closed() -> bool:
            left[:] = [(peer, trickle) for peer, trickle in left if not closed(peer, trickle)]
            return not left

        until(all_closed)


def test_slow_readers_are_cut_off(hasty: Gate) -> None:
    """Hundreds of answers asked for in one breath, and none of them read."""
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(("127.0.0.1", hasty.settings.port))
        peer.setblocking(False)
        until(lambda: cut_while_sending(peer, ASK * 100))


def test_a_large_answer_does_not_buy_hours() -> None:
    limits = Limits()
    assert limits.reading_s(0) == 30 and limits.reading_s(40_960) == 40
    assert limits.reading_s(40_000_000) == 120


def cut_while_sending(peer: socket.socket, content: bytes) -> bool:
    """Whether sending fails, without ever reading; it sends all that there is room for."""
    try:
        while True:
            peer.send(content)
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_endless_headers_are_refused_before_they_end(hasty: Gate) -> None:
    with connect(hasty) as peer:
        peer.setblocking(True)
        peer.sendall(b"GET /livez HTTP/1.1\r\nx-a: " + b"a" * 200_000)
        answer = peer.recv(65536)
        assert answer.startswith(b"HTTP/1.1 431 ") and b'"headers_too_large"' in answer
        assert b"\r\nx-safety: prompt-rules=hard" in answer and b"\r\ndate: " in answer
        peer.setblocking(False)
        until(lambda: closed(peer, b"a" * 1000))


def test_too_many_headers_are_refused(hasty: Gate) -> None:
    many = {f"x-{n}": "1" for n in range(101)}
    assert httpx.get(f"{hasty.url}/livez", headers=many).status_code == 431


POST = b"POST /v2/x HTTP/1.1\r\nhost: x\r\n"
RAW = [
    b"\x16\x03\x01\x02\x00\x01\x00",  # TLS
    b"\x00" * 100,
    b"x\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nname with space: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nx-api-key: \xff\xfe\r\n\r\n",
    b"GET / HTTP/1.1\r\nx: a\x00b\r\n\r\n",
    b"GET / HTTP/1.1\r\n folded: x\r\n\r\n",
    b"GET http://elsewhere.example/v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET //elsewhere.example/%2e%2e/ HTTP/1.1\r\nhost: x\r\n\r\n",
    b"CONNECT elsewhere.example:443 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
    POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    POST + b"content-length: -1\r\n\r\n",
    POST + b"content-length: 99999999999999999999999\r\n\r\n",
    POST + b"content-length: 0x10\r\n\r\n",
    POST + b"transfer-encoding: gzip\r\n\r\n",
    POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    POST + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    POST + b"transfer-encoding: chunked\r\n\r\n-1\r\n",
]


@pytest.mark.parametrize("raw", RAW, ids=lambda raw: repr(raw[-30:]))
def test_odd_bytes_end_in_4xx_or_nothing(gate: Gate, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", gate.settings.port), timeout=LIMIT_S) as peer:
        peer.sendall(raw)
        peer.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: peer.recv(65536), b""))
    assert not answer or answer.startswith(
        (b"HTTP/1.1 4", b"HTTP/1.1 200 ") if b"/livez" in raw or b"models" in raw else b"HTTP/1.1 4"
    )
    assert httpx.get(f"{gate.url}/livez").status_code == 200


def honest(gate: Gate) -> int:
    """How many of HONEST whole requests, each on its own connection, are answered."""
    fine, new = 0, httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=gate.url, limits=new, timeout=30) as client:
        for _ in range(HONEST):
            with suppress(httpx.TransportError):
                fine += client.get("/v1/models").status_code == 200
    return fine


def attack(gate: Gate) -> int:
    """Honest requests that were answered among SLOW half-sent ones from the same address."""
    with ExitStack() as stack:
        for n in range(SLOW):
            with suppress(OSError):  # cut off already
                peer = stack.enter_context(connect(gate))
                peer.send(HEAD + (b"content-length: 100\r\n\r\n" if n % 2 else b"x-slow: "))
        return honest(gate)


def test_an_honest_client_among_500_slow_ones(hasty: Gate) -> None:
    assert attack(hasty) >= 0.99 * HONEST


def test_mutant_without_making_room(hasty: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were newcomers refused instead, the slow ones would keep everybody out."""
    monkeypatch.setattr(
        connections.ConnectionLimiter, "_make_room", lambda self, connections: False
    )
    monkeypatch.setattr(protocol.DeadlineProtocol, "overdue", lambda self, now: False)
    monkeypatch.setattr(body_limit, "BODY_S", 60.0)
    assert attack(hasty) < 0.5 * HONEST


class Slow:
    """A connection that says `first`, then `trickle` now and then, and reads a few bytes a time;
    it comes back when it is cut. `lived`: the seconds until each cut was seen.
    """

    def __init__(self, gate: Gate, first: bytes, trickle: bytes) -> None:
        self._gate, self._first, self._trickle = gate, first, trickle
        self.lived: list[float] = []
        self._begin()

    def go_on(self) -> None:
        try:
            self._peer.send(self._trickle)
            if self._peer.recv(64) == b"":
                raise ConnectionResetError
        except BlockingIOError:
            pass
        except OSError:
            self.lived.append(time.monotonic() - self._since)
            self._peer.close()
            self._begin()

    def _begin(self) -> None:
        self._since = time.monotonic()
        self._peer = socket.socket()
        self._peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._peer.connect(("127.0.0.1", self._gate.settings.port))
        self._peer.setblocking(False)
        self._peer.send(self._first)

    def close(self) -> None:
        self._peer.close()


KINDS = [
    (b"", b""),  # says nothing
    (b"GET /livez HTTP/1.1\r\nx-a: ", b"a"),  # slow headers
    (HEAD + b"content-length: 1000\r\n\r\n", b"a"),  # a slow body
    (ASK * 40, b""),  # a slow reader
]


@contextmanager
def slow_ones(gate: Gate) -> Iterator[list[Slow]]:
    """SLOW open connections of all kinds, for as long as the block."""
    ended = threading.Event()
    peers = [Slow(gate, *KINDS[n % len(KINDS)]) for n in range(SLOW)]

    def slowly() -> None:
        while not ended.wait(0.5):
            for peer in peers:
                peer.go_on()

    thread = threading.Thread(target=slowly)
    thread.start()
    try:
        yield peers
    finally:
        ended.set()
        thread.join()
        for peer in peers:
            peer.close()


def works(client: httpx.Client, n: int) -> bool:
    """Whether the n-th thing that one who works here does is answered."""
    with suppress(httpx.TransportError):
        if n % 3 == 0:
            answer = client.post("/v2/micro", json={"prompt": "hold"})
            return client.get(answer.json()["status_url"]).is_success
        return client.get("/v1/models" if n % 3 == 1 else "/v1/credits").is_success
    return False


@pytest.mark.slow
def test_500_slow_ones_under_the_limits_as_shipped(tmp_path: Path) -> None:
    """Until all without whole headers were cut, and came back; with a body one may take longer."""
    (tmp_path / "data").mkdir()
    answered: list[bool] = []
    beside = 0  # requests that were answered while the slow ones were there
    with Gate(tmp_path / "data").running() as shipped:
        assert shipped.limiter.limits == Limits()
        new = httpx.Limits(max_keepalive_connections=0)  # a connection for every request
        rich = {"x-api-key": shipped.make_key(rpm=10_000)}
        with (
            slow_ones(shipped) as peers,
            httpx.Client(base_url=shipped.url, headers=rich, limits=new, timeout=30) as client,
        ):
            silent, headers, bodies, _ = (peers[kind :: len(KINDS)] for kind in range(len(KINDS)))

            def all_cut_and_200_answered() -> bool:
                nonlocal beside
                crowded = shipped.limiter.count >= 0.98 * SLOW  # else some are on their way back
                answered.append(works(client, len(answered)))
                beside += crowded and answered[-1]
                return beside >= 200 and all(peer.lived for peer in (*silent, *headers))

            until(all_cut_and_200_answered, 5 * LIMIT_S, every_s=0.03, say=lambda: beside)
    assert sum(answered) >= 0.99 * len(answered)
    assert all(lived > body_limit.BODY_S for peer in bodies for lived in peer.lived)


@contextmanager
def pinging(gate: Gate, count: int) -> Iterator[None]:
    """Connections that ask a little now and then, and come back when they are cut; each has been
    answered once.
    """
    ended, peers = threading.Event(), [connect(gate) for _ in range(count)]
    answered: set[socket.socket] = set()

    def again(peer: socket.socket) -> socket.socket:
        try:
            peer.send(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            if peer.recv(65536) == b"":
                raise ConnectionResetError
            answered.add(peer)
        except BlockingIOError:
            pass
        except OSError:
            peer.close()
            return connect(gate)
        return peer

    def ping() -> None:
        while not ended.wait(0.3):
            peers[:] = [again(peer) for peer in peers]

    thread = threading.Thread(target=ping)
    thread.start()
    try:
        until(lambda: answered >= set(peers))
        yield
    finally:
        ended.set()
        thread.join()
        for peer in peers:
            peer.close()


@contextmanager
def not_reading(gate: Gate, count: int) -> Iterator[None]:
    """Connections that ask for more than the kernel holds, and never read it: they are stuck."""
    with ExitStack() as stack:
        for _ in range(count):
            peer = stack.enter_context(socket.socket())
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.connect(("127.0.0.1", gate.settings.port))
            peer.send(ASK * 100)
        limiter = gate.limiter
        until(lambda: limiter.count >= count)
        until(lambda: sum(c._stalled is not None for c in limiter._all()) >= count)
        yield


def among_others(gate: Gate) -> int:
    """Honest requests that were answered while others hold every place of the address."""
    with not_reading(gate, ROOM // 4), pinging(gate, ROOM):
        return honest(gate)


def test_an_honest_client_among_idle_ones_and_some_that_do_not_read(patient: Gate) -> None:
    assert among_others(patient) >= 0.99 * HONEST


def test_those_that_do_not_read_make_room_too(patient: Gate) -> None:
    with not_reading(patient, ROOM):
        assert honest(patient) >= 0.99 * HONEST


def test_mutant_others_stay(patient: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Did only those make room who owe us the rest of a request, the others would keep all out."""
    monkeypatch.setattr(
        protocol.DeadlineProtocol,
        "waited_since",
        lambda self: None if self.due is None else self.since,
    )
    with not_reading(patient, ROOM):
        assert honest(patient) < 0.5 * HONEST


class Peer:
    """A connection as the limiter sees it, from an address, waited for since a time or served."""

    def __init__(self, address: str, since: float, *, served: bool = False) -> None:
        self.address, self.since = address, None if served else since
        self.loop, self.was_cut = asyncio.new_event_loop(), False
        self.loop.close()

    def waited_since(self) -> float | None:
        return self.since

    def cut(self) -> None:
        self.was_cut = True


def test_who_makes_room() -> None:
    limiter: Any = connections.ConnectionLimiter(Limits(connections=3, per_address=2))
    limiter._timer = object()  # no sweeps here
    served, slow, slower = Peer("a", 1, served=True), Peer("a", 3), Peer("b", 2)
    assert all(limiter.enter(peer) for peer in (served, slow, slower))
    assert limiter.enter(Peer("a", 4))  # its address is full: the slow one of that address goes
    assert (served.was_cut, slow.was_cut, slower.was_cut) == (False, True, False)
    assert limiter.enter(Peer("c", 5, served=True))  # all is full: the slowest of all goes
    assert slower.was_cut and not served.was_cut
    limiter.leave(slower)  # a second time, as its connection ends: no harm
    busy = [Peer(str(n), 6, served=True) for n in range(3)]
    limiter = connections.ConnectionLimiter(Limits(connections=3, per_address=2))
    limiter._timer = object()
    assert all(limiter.enter(peer) for peer in busy)
    assert not limiter.enter(Peer("d", 7))  # nobody who is served makes room
    for peer in busy:
        limiter.leave(peer)
    assert limiter.count == 0 and limiter._open == {} and limiter.enter(Peer("d", 8))


def test_who_reads_goes_last_and_who_has_stopped_does_not() -> None:
    """Sizes of what is unread, sweep by sweep, and since when it then keeps us waiting."""
    clock, unread = SimpleNamespace(time=lambda: 100.0), iter([900, 900, 700, 700, 700, 0, 0])
    reader: Any = protocol.DeadlineProtocol.__new__(protocol.DeadlineProtocol)
    reader.limiter, reader.loop, reader.due = connections.ConnectionLimiter(Limits()), clock, None
    reader._unread, reader._read_by, reader._stalled = 0, None, None
    reader.cycle, reader._no_request = SimpleNamespace(response_complete=False), True
    seen = []
    for now in range(1, 8):
        size = next(unread)
        reader.transport = SimpleNamespace(get_write_buffer_size=lambda size=size: size)
        assert not reader.overdue(float(now))
        seen.append(reader.waited_since())
    assert seen == [100.0, 2.0, 100.0, 4.0, 4.0, None, None]


def test_caps_are_settings(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    gate = Gate(tmp_path / "data", connections=7, connections_per_address=3)
    limiter = serve.server(gate.settings).config.http.limiter  # type: ignore[union-attr]
    assert (limiter.limits.connections, limiter.limits.per_address) == (7, 3)
    gate.database.close()


# -- keys in logs -----------------------------------------------------------------------------


def provoke(url: str, key: str) -> None:
    """Requests with this key in every place, some of which end in errors."""
    with httpx.Client(base_url=url, headers={"x-api-key": key}) as client:
        client.get("/v1/get-user-credits")
        client.get(f"/v1/get-user-credits?api_key={key}")
        client.post("/v1/none", json={"prompt": key})
        client.post("/v1/micro", content=b"{", headers={"content-type": "application/json"})
        client.post("/v2/micro", json={"prompt": "x", "seed": key})
        client.get(f"/v2/requests/{key}")
        client.get(f"/files/{key}")
        client.get("/openai/v1/models", headers={"authorization": f"Bearer {key}"})
        client.get("/sdapi/v1/options", headers={"authorization": f"Basic {key}"})
    port = httpx.URL(url).port
    with socket.create_connection(("127.0.0.1", port), timeout=5) as peer:
        peer.sendall(f"GET /{key} NO\r\nx-api-key: {key}\r\n\r\n".encode())
        peer.recv(1000)


@pytest.mark.slow
def test_keys_are_not_in_the_servers_log(tmp_path: Path) -> None:
    """The command as people run it, at its most talkative, without a worker."""
    talkative = {"IMAGED_WORKERS": "0", "IMAGED_LOG": "DEBUG"}
    server = Server(tmp_path / "data", environ=talkative).start(ready=False)
    made = cli("keys", "create", "--data", str(server.data)).stdout.strip()
    wrong = "SG_" + os.urandom(16).hex()
    for key in (made, wrong, server.key):
        provoke(server.url, key)
    server.stop()
    log = (tmp_path / "data.log").read_text()
    assert "Invalid HTTP request" in log  # something was logged
    assert made.startswith("SG_") and not any(key in log for key in (made, wrong, server.key))


def logged_keys(gate: Gate, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Lines of any logger, at any level, that hold a key."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="imaged"), caplog.at_level("DEBUG", "uvicorn"):
        provoke(gate.url, gate.key)
    return [line for line in caplog.text.splitlines() if gate.key in line]


def test_mutant_key_in_log(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    from imaged.gateway.submit import admission

    assert logged_keys(gate, caplog) == []
    right = admission.Admission.key

    async def careless(self: Any, header: str | None) -> Any:
        logging.getLogger("imaged.gateway").info("asked with %s", header)
        return await right(self, header)

    with red(admission.Admission, "key", careless):
        assert logged_keys(gate, caplog) == []


def test_no_log_call_can_hold_a_header() -> None:
    """No file of the gateway hands headers, keys or bodies to a logger."""
    for path in Path(protocol.__file__).parent.glob("*.py"):
        for call in re.findall(r"\blog\w*\.\w+\(.*", path.read_text()):
            handed = re.sub(r"\"[^\"]*\"", "", call)  # the fixed text may speak of them
            assert not re.search(r"header|key|body|prompt|query", handed), (path.name, call)
