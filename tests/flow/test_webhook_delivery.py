"""Webhooks on a real store and with a real receiver: written with the end, told at least once."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from typing import Any

import pytest
import sqlalchemy as sa
from standardwebhooks import Webhook as Verifier

from imaged.errors import TooManyWebhooks, UnknownWebhook
from imaged.gateway.webhooks import delivery
from imaged.gateway.webhooks.delivery import WebhookDelivery, again_in_s
from imaged.gateway.webhooks.url_guard import UrlGuard
from imaged.jobs import State
from imaged.store.jobs import queue
from imaged.store.sql.database import Database
from imaged.store.sql.group_commit import Writer
from imaged.store.webhooks import outbox, subscriptions
from imaged.store.webhooks.subscriptions import ANY_END, COMPLETED, FAILED, Event
from tests.conftest import serving, until_async
from tests.in_store import KEEP_S, RESULT, SECRET, claim, get, make_key, put, worker

LOCAL = [ip_network("127.0.0.0/8")]


def subscribe(
    db: Database, key_id: int, url: str = "http://x/", types: Sequence[str] = (ANY_END,)
) -> str:
    with db.write() as c:
        return subscriptions.add(c, key_id, url, types, 1.0).id


def log_of(db: Database, key_id: int, webhook_id: str) -> list[Event]:
    with db.read() as c:
        return subscriptions.log_of(c, key_id, webhook_id)


def end(db: Database, key_id: int, state: State = State.COMPLETED) -> str:
    """One job of this key that has ended so."""
    job_id = put(db, key_id, now=1.0)
    if state is State.CANCELLED:
        with db.write() as c:
            queue.cancel(c, job_id, 3.0, KEEP_S)
        return job_id
    name = f"w-{job_id}"
    worker(db, name)
    [job] = claim(db, name)
    with db.write() as c:
        if state is State.COMPLETED:
            assert queue.finish(c, job, name, RESULT, 3.0, KEEP_S)
        else:
            assert queue.fail(c, job, name, "nan_output", "text", 3.0, KEEP_S)
    return job_id


# -- the outbox -----------------------------------------------------------------------------------


def test_every_end_is_written_for_those_who_want_it(db: Database) -> None:
    mine, other = make_key(db), make_key(db)
    hooks = {kind: subscribe(db, mine, types=[kind]) for kind in subscriptions.TYPES}
    foreign = subscribe(db, other)
    ends = [end(db, mine, s) for s in (State.COMPLETED, State.FAILED, State.CANCELLED)]
    heard = {kind: {e.job_id: e.type for e in log_of(db, mine, h)} for kind, h in hooks.items()}
    assert heard[COMPLETED] == {ends[0]: COMPLETED}
    assert heard[FAILED] == {ends[1]: FAILED, ends[2]: FAILED}
    assert heard[ANY_END] == {**heard[COMPLETED], **heard[FAILED]}
    assert log_of(db, other, foreign) == []


def test_what_time_ends_is_written_too(db: Database) -> None:
    key_id = make_key(db)
    hook = subscribe(db, key_id)
    jobs = {put(db, key_id, now=1.0) for _ in range(3)}
    with db.write() as c:
        queue.reap(c, 100.0, lease_s=10, queue_s=50, run_s=50, retention_s=KEEP_S)
    assert {event.job_id for event in log_of(db, key_id, hook)} == jobs


def test_the_row_and_the_end_are_one_transaction(db: Database) -> None:
    key_id = make_key(db)
    hook = subscribe(db, key_id)
    job_id = put(db, key_id)
    worker(db)
    [job] = claim(db)
    with pytest.raises(RuntimeError), db.write() as c:
        queue.finish(c, job, "w", RESULT, 3.0, KEEP_S)
        raise RuntimeError("the process dies before the commit")
    assert get(db, job_id).state is State.PROCESSING and log_of(db, key_id, hook) == []
    with db.write() as c:
        assert queue.finish(c, job, "w", RESULT, 4.0, KEEP_S)
        assert not queue.finish(c, job, "w", RESULT, 5.0, KEEP_S)
    assert [event.job_id for event in log_of(db, key_id, hook)] == [job_id]


def test_mutant_that_writes_the_row_after_the_commit_loses_it(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_id = make_key(db)
    hook = subscribe(db, key_id)
    later: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(outbox, "announce", lambda _, ids, now: later.append((ids, now)))
        job_id = end(db, key_id)
    with pytest.raises(RuntimeError), db.write() as c:
        outbox.announce(c, *later[0])
        raise RuntimeError("the process dies before the second commit")
    assert get(db, job_id).state is State.COMPLETED
    assert log_of(db, key_id, hook) == []  # nobody will ever hear of it


def lease(db: Database, now: float, **limits: int) -> list[outbox.QueuedEvent]:
    with db.write() as c:
        return outbox.lease(c, now, limits.get("limit", 99), limits.get("each", 99))


def test_a_lease_is_exclusive_and_runs_out(db: Database) -> None:
    key_id = make_key(db)
    hook = subscribe(db, key_id)
    for _ in range(20):
        end(db, key_id)
    with ThreadPoolExecutor(4) as pool:
        taken = [p for part in pool.map(lambda _: lease(db, 10.0, limit=5), range(8)) for p in part]
    assert len(taken) == len({p.id for p in taken}) == 20
    assert lease(db, 10.0 + outbox.LEASE_S - 1) == []
    again = lease(db, 10.0 + outbox.LEASE_S)  # whoever took them has died
    assert {p.id for p in again} == {p.id for p in taken}
    assert {p.attempt for p in again} == {2}
    with db.write() as c:
        outbox.failed(c, taken[0], None, "late", 50.0, None)  # the first attempt, late: no effect
        outbox.delivered(c, taken[1], 200, 50.0)  # late, and yet it has heard
    states = {e.id: e.state for e in log_of(db, key_id, hook)}
    assert (states[taken[0].id], states[taken[1].id]) == ("WAITING", "DELIVERED")


def test_no_key_takes_all_the_room(db: Database) -> None:
    flood, small = make_key(db), make_key(db)
    for _ in range(3):  # nor by having many webhooks
        subscribe(db, flood)
    subscribe(db, small)
    for _ in range(5):
        end(db, flood)
    end(db, small)
    taken = [p.key_id for p in lease(db, 10.0, limit=5, each=4)]
    assert (taken.count(flood), taken.count(small)) == (4, 1)
    with db.write() as c:
        assert outbox.lease(c, 10.0, 5, 4, full=[flood]) == []


def test_slow_receivers_do_not_hold_up_another_key(
    db: Database, receiver: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MAX_DELIVERIES", 4)
    monkeypatch.setattr(delivery, "MAX_DELIVERIES_PER_KEY", 3)
    slow, small = make_key(db), make_key(db)
    for _ in range(2):
        subscribe(db, slow, address(receiver, "/slow"))
    hook = subscribe(db, small, address(receiver))
    for _ in range(5):
        end(db, slow)
    for _ in range(3):
        end(db, small)
    writer, url_guard = Writer(db), UrlGuard(LOCAL)
    webhook_delivery = WebhookDelivery(db, writer, SECRET, url_guard)

    async def work() -> None:
        while any(event.state == "WAITING" for event in log_of(db, small, hook)):
            await webhook_delivery.turn()
            await asyncio.sleep(0.02)
        tasks = webhook_delivery.under_way
        await until_async(lambda: len(tasks) <= 3)  # the last one told has yet to leave
        under_way = len(webhook_delivery.under_way)
        assert under_way == 3  # the slow ones are still at it
        for task in webhook_delivery.under_way:
            task.cancel()

    asyncio.run(asyncio.wait_for(work(), 60))
    url_guard.close()
    writer.close()


def test_webhooks_belong_to_their_key(db: Database) -> None:
    mine, other = make_key(db), make_key(db)
    hook = subscribe(db, mine)
    with db.write() as c:
        assert subscriptions.of_key(c, other) == []
        for forbidden in (
            lambda: subscriptions.update(c, other, hook, "http://evil/", [ANY_END]),
            lambda: subscriptions.deactivate(c, other, hook, 2.0),
            lambda: subscriptions.log_of(c, other, hook),
        ):
            with pytest.raises(UnknownWebhook):
                forbidden()
        assert subscriptions.update(c, mine, hook, "http://y/", [FAILED]).url == "http://y/"
        for _ in range(subscriptions.MAX_WEBHOOKS_PER_KEY - 1):
            subscriptions.add(c, mine, "http://x/", [ANY_END], 1.0)
        with pytest.raises(TooManyWebhooks):
            subscriptions.add(c, mine, "http://x/", [ANY_END], 1.0)


def test_a_deleted_webhook_hears_nothing_more_and_keeps_its_log(db: Database) -> None:
    key_id = make_key(db)
    hook = subscribe(db, key_id)
    end(db, key_id)
    with db.write() as c:
        subscriptions.deactivate(c, key_id, hook, 5.0)
        assert subscriptions.of_key(c, key_id) == []
        with pytest.raises(UnknownWebhook):
            subscriptions.deactivate(c, key_id, hook, 6.0)
    end(db, key_id)
    [event] = log_of(db, key_id, hook)
    assert (event.state, event.problem) == ("DEAD", "the webhook was deleted")
    assert lease(db, 99.0) == []
    with db.write() as c:
        outbox.delete_older(c, 4.0)
        assert len(subscriptions.log_of(c, key_id, hook)) == 1
        outbox.delete_older(c, 6.0)
        with pytest.raises(UnknownWebhook):
            subscriptions.log_of(c, key_id, hook)


def test_the_secret_is_in_no_table(db: Database) -> None:
    hook = subscribe(db, make_key(db))
    secret = subscriptions.secret_of(SECRET, hook)
    assert secret.startswith("whsec_") and secret != subscriptions.secret_of(b"another", hook)
    with db.read() as c:
        rows = repr(c.execute(sa.text("SELECT * FROM webhooks")).all())
    assert secret not in rows and secret.removeprefix("whsec_") not in rows


def test_patience_grows_and_ends() -> None:
    waits = [again_in_s(n) for n in range(1, len(delivery.WAITS_S) + 2)]
    assert waits[-1] is None
    known = [wait for wait in waits if wait is not None]
    assert known == sorted(known) and 4 <= known[0] <= 6
    assert len({again_in_s(1) for _ in range(9)}) > 1  # not all of them at once


# -- telling --------------------------------------------------------------------------------------


class Receiver(BaseHTTPRequestHandler):
    """Answers with the statuses it was given, the last one for ever; keeps what it heard."""

    answers: list[int]
    heard: list[tuple[str, dict[str, str], bytes]]
    sent: list[int]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.heard.append((self.path, headers, body))
        status = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if self.path == "/slow":  # no single wait is long
            for _ in range(400):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nx-slow: 1\r\n"[:1])
                time.sleep(0.05)
        self.send_response(status)
        self.send_header("location", "/moved")
        self.end_headers()
        if self.path == "/large":
            for _ in range(1000):
                self.wfile.write(b"x" * 100_000)
                self.sent.append(100_000)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[ThreadingHTTPServer]:
    Receiver.answers, Receiver.heard, Receiver.sent = [200], [], []
    with serving(Receiver) as server:
        yield server


def turns(
    db: Database, count: int = 1, url_guard: UrlGuard | None = None, public_url: str = ""
) -> None:
    """What a gateway's dispatcher does in so many looks at the outbox."""
    writer = Writer(db)
    url_guard = url_guard or UrlGuard(LOCAL)
    webhook_delivery = WebhookDelivery(db, writer, SECRET, url_guard, public_url)

    async def work() -> None:
        for _ in range(count):
            await webhook_delivery.turn()
            await webhook_delivery.drain()

    try:
        asyncio.run(work())
    finally:
        url_guard.close()
        writer.close()


def address(receiver: ThreadingHTTPServer, path: str = "/hook") -> str:
    return f"http://127.0.0.1:{receiver.server_port}{path}"


def test_an_event_is_signed_and_told_once(db: Database, receiver: ThreadingHTTPServer) -> None:
    key_id = make_key(db)
    hook = subscribe(db, key_id, address(receiver))
    job_id, failed = end(db, key_id), end(db, key_id, State.FAILED)
    turns(db, 3, public_url="https://images.example/")
    assert len(Receiver.heard) == 2
    verifier = Verifier(subscriptions.secret_of(SECRET, hook))
    told = {}
    for path, headers, body in Receiver.heard:
        assert path == "/hook" and headers["host"] == f"127.0.0.1:{receiver.server_port}"
        message = verifier.verify(body, headers)  # the published library; it raises otherwise
        told[message["data"]["request_id"]] = message
        with pytest.raises(Exception, match="No matching signature"):
            verifier.verify(body.replace(b"COMPLETED", b"completed") + b" ", headers)
        with pytest.raises(Exception, match="No matching signature"):
            Verifier(subscriptions.secret_of(SECRET, "other")).verify(body, headers)
    assert told[job_id] == {
        "type": "generation.completed",
        "timestamp": "1970-01-01T00:00:03.000Z",
        "data": {
            "request_id": job_id,
            "model": "m",
            "status": "COMPLETED",
            "metrics": {"queue_time": 1.0, "total_time": 2.0, "cost": 0.00001},
            "response_url": f"https://images.example/v2/requests/{job_id}",
        },
    }
    assert told[failed]["type"] == "generation.failed"
    assert (told[failed]["data"]["code"], told[failed]["data"]["status"]) == (
        "nan_output",
        "FAILED",
    )
    assert "cost" not in told[failed]["data"]["metrics"]
    assert {(e.state, e.status, e.attempts) for e in log_of(db, key_id, hook)} == {
        ("DELIVERED", 200, 1)
    }


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "WAITS_S", (0.0,) * len(delivery.WAITS_S))


def test_it_is_told_again_under_the_same_id(
    db: Database, receiver: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    Receiver.answers = [500, 301, 204]
    key_id = make_key(db)
    hook = subscribe(db, key_id, address(receiver))
    end(db, key_id)
    turns(db)
    [event] = log_of(db, key_id, hook)
    assert (event.state, event.status, event.problem) == ("WAITING", 500, "the answer was 500")
    turns(db, 5)
    assert [path for path, *_ in Receiver.heard] == ["/hook"] * 3  # nor is a redirect followed
    assert {headers["webhook-id"] for _, headers, _ in Receiver.heard} == {event.id}
    assert len({body for *_, body in Receiver.heard}) == 1
    [event] = log_of(db, key_id, hook)
    assert (event.state, event.status, event.attempts) == ("DELIVERED", 204, 3)


def test_a_deaf_receiver_is_given_up(
    db: Database, receiver: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    Receiver.answers = [503]
    key_id = make_key(db)
    hook = subscribe(db, key_id, address(receiver))
    end(db, key_id)
    turns(db, 20)
    assert len(Receiver.heard) == len(delivery.WAITS_S) + 1
    [event] = log_of(db, key_id, hook)
    assert (event.state, event.problem) == ("DEAD", "the answer was 503")


def test_a_receiver_that_is_gone_is_disabled(db: Database, receiver: ThreadingHTTPServer) -> None:
    Receiver.answers = [410]
    key_id = make_key(db)
    hook = subscribe(db, key_id, address(receiver))
    end(db, key_id)
    turns(db, 2)
    end(db, key_id)
    assert len(Receiver.heard) == 1
    [event] = log_of(db, key_id, hook)
    assert event.state == "DEAD" and "410" in (event.problem or "")
    with db.read() as c:
        assert subscriptions.of_key(c, key_id) == []


def test_a_slow_or_endless_answer_does_not_hold_us(
    db: Database, receiver: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_id = make_key(db)
    large = subscribe(db, key_id, address(receiver, "/large"))
    end(db, key_id)
    turns(db)
    [event] = log_of(db, key_id, large)
    assert event.state == "DELIVERED"
    assert sum(Receiver.sent) < 50_000_000  # of a hundred million
    monkeypatch.setattr(delivery, "TIMEOUT_S", 0.3)
    slow = subscribe(db, key_id, address(receiver, "/slow"))
    end(db, key_id)
    turns(db)
    [event] = log_of(db, key_id, slow)
    assert (event.state, event.status) == ("WAITING", None)
    assert "no answer within" in (event.problem or "")


def test_what_was_told_and_not_noted_is_told_again(
    db: Database, receiver: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_id = make_key(db)
    hook = subscribe(db, key_id, address(receiver))
    end(db, key_id)

    def dies(*_: Any) -> None:
        raise RuntimeError("the process dies here")

    with monkeypatch.context() as patch:
        patch.setattr(outbox, "delivered", dies)
        with pytest.raises(RuntimeError):
            turns(db)
    turns(db)
    assert len(Receiver.heard) == 1  # its lease still holds
    with db.write() as c:
        c.execute(sa.text("UPDATE outbox SET due_at = 0"))  # and now it has run out
    turns(db)
    assert len(Receiver.heard) == 2
    assert len({headers["webhook-id"] for _, headers, _ in Receiver.heard}) == 1
    assert log_of(db, key_id, hook)[0].state == "DELIVERED"


def test_two_gateways_tell_each_event_once(db: Database, receiver: ThreadingHTTPServer) -> None:
    key_id = make_key(db)
    subscribe(db, key_id, address(receiver))
    for _ in range(12):
        end(db, key_id)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: turns(db, 6), range(2)))
    told = [headers["webhook-id"] for _, headers, _ in Receiver.heard]
    assert len(told) == len(set(told)) == 12


# -- where it goes --------------------------------------------------------------------------------


def to(*answers: str) -> Any:
    """A resolver that gives one address a time, whatever the name."""
    left = list(answers)

    def lookup(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (left.pop(0), port))]

    return lookup


def rebound(db: Database, receiver: ThreadingHTTPServer) -> int:
    """How often a receiver here is reached by a name whose looked-at address is elsewhere."""
    key_id = make_key(db)
    subscribe(db, key_id, f"http://localhost:{receiver.server_port}/")
    end(db, key_id)
    turns(db, url_guard=UrlGuard([ip_network("127.0.0.9/32")], lookup=to("127.0.0.9", "127.0.0.1")))
    return len(Receiver.heard)


def test_the_connection_goes_to_the_address_that_was_looked_at(
    db: Database, receiver: ThreadingHTTPServer
) -> None:
    assert rebound(db, receiver) == 0


def test_mutant_that_connects_to_the_name_is_seen(
    db: Database, receiver: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def name(_: UrlGuard, url: Any, key_id: int) -> str:
        return str(url.host)

    monkeypatch.setattr(UrlGuard, "resolve", name)
    assert rebound(db, receiver) == 1


def test_the_name_goes_into_host_and_into_the_handshake(
    db: Database, receiver: ThreadingHTTPServer
) -> None:
    key_id = make_key(db)
    subscribe(db, key_id, f"http://hooks.example:{receiver.server_port}/")
    with socket.create_server(("127.0.0.1", 0)) as tls:
        port = tls.getsockname()[1]
        subscribe(db, key_id, f"https://xn--hks-0na.example:{port}/")
        end(db, key_id)
        hello: list[bytes] = []

        def greet() -> None:
            with tls.accept()[0] as connection:
                hello.append(connection.recv(4096))

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        turns(db, url_guard=UrlGuard(LOCAL, lookup=to("127.0.0.1", "127.0.0.1")))
        thread.join(10)
    [(_, headers, _)] = Receiver.heard
    assert headers["host"] == f"hooks.example:{receiver.server_port}"
    assert b"xn--hks-0na.example" in hello[0]  # the client's first words name the server


@pytest.mark.parametrize("url", ["http://localhost:{}/", "http://127.0.0.1:{}/"])
def test_nothing_here_is_reached_unless_the_operator_opens_it(
    db: Database, receiver: ThreadingHTTPServer, url: str
) -> None:
    key_id = make_key(db)
    hook = subscribe(db, key_id, url.format(receiver.server_port))
    end(db, key_id)
    turns(db, url_guard=UrlGuard())
    [event] = log_of(db, key_id, hook)
    assert (event.state, event.problem) == ("WAITING", "the address is not a public one")
    assert Receiver.heard == []


def test_the_message_does_not_change_with_time(db: Database) -> None:
    key_id = make_key(db)
    subscribe(db, key_id)
    end(db, key_id)
    first = [json.dumps(delivery.message(p, "")) for p in lease(db, 10.0)]
    with db.write() as c:
        assert queue.delete_expired(c, 1e9)  # the job's own record is gone
    assert [json.dumps(delivery.message(p, "")) for p in lease(db, 1e9)] == first
