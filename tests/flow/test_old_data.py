"""Data folders that earlier versions left behind: today's code opens them, and all is well.

Each file of tests/old_data is one, with what its version said of it; make.py there says how.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from imaged.store.accounts import keys, ledger
from imaged.store.sql.database import Database
from imaged.store.sql.schema import outbox
from imaged.store.webhooks import subscriptions
from tests.conftest import SLUG, Server, imaged, until

FOLDERS = sorted((Path(__file__).parents[1] / "old_data").glob("*.tar.gz"))
LONG = "100000000000"  # seconds, as the folders were made: nothing in them is over
SETTINGS = {f"IMAGED_{name}_S": LONG for name in ("RETENTION", "QUEUE", "HISTORY")}


@dataclass
class Opened:
    """An old folder under today's server, and what was told of it when it was new."""

    server: Server
    told: dict[str, Any]
    free: list[int] = field(default_factory=list)  # micro-dollars of each key, when opened
    heard: dict[str, Any] = field(default_factory=dict)  # by its webhook, under each webhook-id

    def get(self, path: str) -> Any:
        with self.server.client() as client:
            return client.get(path).raise_for_status().json()

    def books(self) -> list[str]:
        db = Database(f"sqlite:///{self.server.data / 'imaged.db'}")
        with db.read() as connection:
            found = ledger.audit(connection)
        db.close()
        return found


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda path: path.name.split(".")[0])
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(request.param) as packed:
        packed.extractall(folder, filter="data")
    environ = {**SETTINGS, "IMAGED_WEBHOOK_NETWORKS": "127.0.0.0/8"}
    told = json.loads((folder / "told.json").read_text())
    old = Opened(Server(folder / "data", environ=environ), told)
    listed = imaged("keys", "list", "--data", str(old.server.data))  # brings the schema up to date
    assert listed.returncode == 0, listed.stderr
    receiver = listen(old)
    look_inside(old, f"http://127.0.0.1:{receiver.server_port}/")
    old.server.start()
    yield old
    old.server.stop()
    receiver.shutdown()
    receiver.server_close()


def look_inside(old: Opened, url: str) -> None:
    """What is in its tables; the webhook leads to us from now on."""
    db = Database(f"sqlite:///{old.server.data / 'imaged.db'}")
    with db.write() as connection:
        assert ledger.audit(connection) == []
        rows = keys.rows(connection)
        old.free = [row.balance_micros - row.reserved_micros for row in rows]
        [hook] = subscriptions.of_key(connection, rows[0].id)
        subscriptions.update(connection, hook.key_id, hook.id, url, hook.types)
        connection.execute(outbox.update().values(due_at=0.0))  # also where the clock is behind
    db.close()


def listen(old: Opened) -> ThreadingHTTPServer:
    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            try:  # the secret that was shown then
                message = Webhook(old.told["webhook"]["secret"]).verify(body, headers)
            except WebhookVerificationError as error:
                message = error
            old.heard[headers["webhook-id"]] = message
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    return receiver


def same(told: Any, now: Any) -> bool:
    """All that was told is told still; there may be more. Links have another port."""
    if isinstance(told, dict):
        return all(name in now and same(value, now[name]) for name, value in told.items())
    if isinstance(told, list):
        return len(told) == len(now) and all(map(same, told, now))
    if isinstance(told, str) and told.startswith("http://127.0.0.1:"):
        return httpx.URL(told).raw_path == httpx.URL(now).raw_path
    return bool(told == now)


def test_there_are_old_folders() -> None:
    assert FOLDERS


def test_its_keys_open_what_they_opened(opened: Opened) -> None:
    free, narrow, _ = opened.free
    assert free / 1e6 == opened.told["credits"]["credits"] and narrow == 2_500_000
    for key, path, status in (
        (opened.server.key, f"/v2/{SLUG}", 400),  # without a prompt
        (opened.told["narrow_key"], "/v2/our-houses", 400),  # its aliases.toml
        (opened.told["narrow_key"], f"/v2/{SLUG}", 403),
        (opened.told["revoked_key"], f"/v2/{SLUG}", 401),
    ):
        with opened.server.client(key) as client:
            assert client.post(path, json={}).status_code == status, path


def test_a_finished_job_is_as_it_was(opened: Opened) -> None:
    told, server = opened.told, opened.server
    now = opened.get(f"/v2/requests/{told['done']['request_id']}")
    assert same(told["done"], now), now
    link = httpx.URL(told["done"]["output"]).copy_with(port=server.port)  # signed then
    for url in (link, now["output"]):
        picture = httpx.get(url).raise_for_status().content
        assert hashlib.sha256(picture).hexdigest() == told["picture_sha256"]
    with server.client() as client:
        again = client.post(f"/v2/{SLUG}", json=told["asked"], headers={"idempotency-key": "first"})
    assert again.json()["request_id"] == told["done"]["request_id"]


def test_its_history_is_told(opened: Opened) -> None:
    """Of the job whose record is gone too."""
    now = {
        row["request_id"]: row for row in opened.get("/inference-request/request-history")["data"]
    }
    told = {row["request_id"]: row for row in opened.told["history"]["data"]}
    assert told.keys() <= now.keys()
    for request_id in (opened.told["done"]["request_id"], opened.told["forgotten"]):
        assert same(told[request_id], now[request_id])


def test_a_receipt_is_still_of_this_server(opened: Opened, tmp_path: Path) -> None:
    now = opened.get(f"/v2/requests/{opened.told['done']['request_id']}")
    path = tmp_path / "picture.jpg"
    path.write_bytes(httpx.get(now["output"]).content)
    read = imaged("verify", "--no-replay", str(path), "--data", str(opened.server.data))
    assert read.returncode == 0 and "signed by this key" in read.stdout, read.stderr
    [image] = now["images"]
    with opened.server.client() as client:
        answer = client.post("/v2/replay", json={"receipt": image["receipt"]}).json()
    assert answer["signed_here"] is True, answer
    assert answer["verdict"] == "identical" or answer["differences"]  # another machine


def test_a_job_that_waited_is_made(opened: Opened) -> None:
    body = opened.server.wait(opened.told["waiting"])
    assert body["status"] == "COMPLETED", body
    [image] = opened.get(f"/v2/requests/{opened.told['waiting']}")["images"]
    assert image["seed"] == 4 and httpx.get(image["url"]).is_success


def test_a_draft_that_rested_is_finished(opened: Opened) -> None:
    """From its states, or from the beginning where engine or device are others."""
    job_id = opened.told["draft"]
    draft = opened.get(f"/v2/requests/{job_id}")
    assert draft["progress"]["parked"] is True
    looks = [httpx.get(image["url"]).raise_for_status().content for image in draft["images"]]
    assert len(set(looks)) == 2
    with opened.server.client() as client:
        client.post(f"/v2/requests/{job_id}/finish", json={"samples": [1]}).raise_for_status()
    body = opened.server.wait(job_id)
    assert body["status"] == "COMPLETED", body
    [image] = opened.get(f"/v2/requests/{job_id}")["images"]
    assert image["seed"] == 4
    assert httpx.get(image["url"]).raise_for_status().content not in looks
    assert opened.books() == []


def test_its_webhook_hears_what_waited(opened: Opened) -> None:
    told = opened.told["webhook"]
    [event] = opened.told["log"]["logs"]
    [hook] = opened.get("/webhook/get")["webhooks"]
    assert hook["webhook_id"] == told["webhook_id"] and hook["event"] == told["event"]
    message = until(lambda: opened.heard.get(event["event_id"]), say=lambda: opened.server.log)
    assert message["data"]["request_id"] == opened.told["done"]["request_id"]
