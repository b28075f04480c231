"""Webhooks on the live server: the vendor's SDK as client, the document's receiver as receiver."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from segmind import SegmindClient
from segmind.webhooks import Webhooks

from tests.conftest import Server, cli, free_port, imaged

DOCUMENT = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text()
SUBSCRIBE, RECEIVE = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.fixture
def sdk(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[SegmindClient]:
    """The vendor's client with a key that no other test uses."""
    monkeypatch.setattr(Webhooks, "base_url", f"{server.url}/webhook")
    made = cli("keys", "create", "--credits", "1", "--data", str(server.data))
    vendors = SegmindClient(api_key=made.stdout.strip(), base_url=f"{server.url}/v1")
    yield vendors
    vendors._client.close()  # it has no close of its own


@pytest.fixture
def received(server: Server) -> Iterator[tuple[Any, int]]:
    """The document's two programs as they stand: what the receiver prints, and its port."""
    port = free_port()
    environ = {
        **os.environ,
        "IMAGED_URL": server.url,
        "IMAGED_API_KEY": server.key,
        "HOOK_URL": f"http://localhost:{port}/hook",
        "HOOK_PORT": str(port),
    }
    done = subprocess.run(
        [sys.executable, "-c", SUBSCRIBE], env=environ, capture_output=True, text=True, check=True
    )
    webhook_id, environ["HOOK_SECRET"] = done.stdout.split()
    receiver = subprocess.Popen(
        [sys.executable, "-c", RECEIVE],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with server.client() as client:
        yield receiver.stdout, port
        assert client.get(f"/webhook/inactive?webhook_id={webhook_id}").status_code == 200
    receiver.kill()
    receiver.communicate()


def test_the_document_works_as_pasted(server: Server, received: tuple[Any, int]) -> None:
    printed, port = received
    completed, cancelled = server.submit(), server.submit(num_inference_steps=100, samples=4)
    with server.client() as client:
        client.delete(f"/v2/requests/{cancelled}")
    server.wait(completed)
    told = {printed.readline().strip() for _ in range(2)}
    assert told == {f"generation.completed {completed}", f"generation.failed {cancelled}"}
    forged = {"webhook-id": "x", "webhook-timestamp": str(int(time.time()))}
    forged["webhook-signature"] = "v1,Zm9yZ2VkZm9yZ2VkZm9yZ2VkZm9yZ2Vk"
    answer = httpx.post(f"http://127.0.0.1:{port}/hook", content=b"{}", headers=forged)
    assert answer.status_code == 400


def test_the_vendors_sdk_manages_webhooks(sdk: SegmindClient, server: Server) -> None:
    assert sdk.webhooks.get() == {"webhooks": []}
    added = sdk.webhooks.add("https://example.com/hook", ["GENERATION"])
    webhook_id = added["webhook_id"]
    assert added.pop("secret").startswith("whsec_") and added["is_active"] is True
    assert sdk.webhooks.get() == {"webhooks": [added]}  # and nowhere the secret again
    changed = sdk.webhooks.update(webhook_id, "https://example.com/2", ["generation.failed"])
    assert changed == {
        **added,
        "webhook_url": "https://example.com/2",
        "event": {"types": ["generation.failed"]},
    }
    assert sdk.webhooks.logs(webhook_id) == {"webhook_id": webhook_id, "logs": []}
    with server.client() as other:  # another key: as if there were none
        for answer in (
            other.get(f"/webhook/inactive?webhook_id={webhook_id}"),
            other.get(f"/webhook/dispatch-logs?webhook_id={webhook_id}"),
            other.post("/webhook/update", json={**changed, "webhook_id": webhook_id}),
        ):
            assert (answer.status_code, answer.json()["code"]) == (404, "unknown_webhook")
    assert sdk.webhooks.delete(webhook_id) == {"webhook_id": webhook_id, "is_active": False}
    assert sdk.webhooks.get() == {"webhooks": []}


def test_wrong_input_is_told(server: Server) -> None:
    good: dict[str, Any] = {
        "webhook_url": "https://example.com/",
        "event": {"types": ["GENERATION"]},
    }
    wrong: list[tuple[Any, str]] = [
        ({}, "webhook_url"),
        ({**good, "webhook_url": "http://10.0.0.1/"}, "webhook_url"),
        ({**good, "webhook_url": "http://169.254.169.254/"}, "webhook_url"),
        ({**good, "webhook_url": 5}, "webhook_url"),
        ({**good, "event": {"types": []}}, "event.types"),
        ({**good, "event": {"types": ["PIXELFLOW"]}}, "event.types"),
        ({**good, "event": {"types": [{}]}}, "event.types"),
        ({**good, "event": "GENERATION"}, "event.types"),
        ([], "body"),
        ("x", "body"),
    ]
    with server.client() as client:
        for body, field in wrong:
            answer = client.post("/webhook/add", json=body)
            assert answer.status_code == 400 and field in answer.json()["error"], body
        assert client.post("/webhook/add", content=b"{}").status_code == 406
        assert client.post("/webhook/update", json=good).status_code == 400
        for path in ("inactive", "dispatch-logs"):
            assert client.get(f"/webhook/{path}").status_code == 400
            for unknown in ("x", "%00", "é", "x" * 999):
                answer = client.get(f"/webhook/{path}?webhook_id={unknown}")
                assert answer.status_code == 404
        assert client.get("/webhook/add").status_code == 405
    for path in ("get", "inactive?webhook_id=x", "dispatch-logs?webhook_id=x"):
        assert httpx.get(f"{server.url}/webhook/{path}").status_code == 401
    assert httpx.post(f"{server.url}/webhook/add", json=good).status_code == 401


@pytest.mark.slow
def test_a_wrong_network_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGED_WEBHOOK_NETWORKS", "10.0.0.0/99")
    done = imaged("serve", "--data", str(tmp_path / "data"))
    assert done.returncode == 1 and "IMAGED_WEBHOOK_NETWORKS" in done.stderr
