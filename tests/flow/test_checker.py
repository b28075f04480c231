"""A checker that refuses every picture: each way of asking hears of it, and nothing is left."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import connect_sse
from segmind import AsyncJob, InferenceFailed, SegmindClient

from tests.conftest import QUICK, SLUG, Server, cli, serving, until

ROOT = Path(__file__).parents[2]
WORDS = "content policy: nobody may see this"
LONG = {**QUICK, "num_inference_steps": 50}  # long enough for a preview, where there is one


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environ = {
        "IMAGED_CHECKER": "tests.flow.refuser:refuse",
        "IMAGED_WEBHOOK_NETWORKS": "127.0.0.0/8",
        "PYTHONPATH": str(ROOT),
    }
    running = Server(tmp_path_factory.mktemp("strict") / "data", environ=environ).start()
    yield running
    running.stop()


class Receiver(BaseHTTPRequestHandler):
    told: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.told.append(json.loads(body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Receiver.told = []
    with serving(Receiver) as server:
        yield f"http://127.0.0.1:{server.server_port}/hook"


def watched(server: Server, key: str) -> tuple[dict[str, Any], bool]:
    """The last event of a long job, and whether a preview was given: then it is cancelled."""
    given = False
    with server.client(key) as client, server.client(key) as second:
        job_id = client.post(f"/v2/{SLUG}", json=LONG).json()["request_id"]
        path = f"/v2/requests/{job_id}"
        with connect_sse(client, "GET", f"{path}/events") as source:
            for event in source.iter_sse():
                asked = second.get(f"{path}/status?preview=1").json()
                if event.event == "preview" or "preview" in asked:
                    given = True
                    second.delete(path)
        assert event.event == "done"
    return event.json(), given


def told_of(count: int) -> list[dict[str, Any]]:
    until(lambda: len(Receiver.told) >= count)
    return Receiver.told


@pytest.mark.slow
def test_a_refused_picture_is_refused_everywhere(strict: Server, address: str) -> None:
    key = cli("keys", "create", "--credits", "9", "--data", str(strict.data)).stdout.strip()
    small = {"prompt": QUICK["prompt"], "steps": 20, "width": 512, "height": 512}
    basic = base64.b64encode(f"me:{key}".encode()).decode()
    with strict.client(key) as client:
        hook = {"webhook_url": address, "event": {"types": ["GENERATION"]}}
        assert client.post("/webhook/add", json=hook).is_success
        done, preview_was_given = watched(strict, key)
        assert not preview_was_given
        path = f"/v2/requests/{done['request_id']}"
        ours = [
            client.post(f"/v1/{SLUG}", json={**QUICK, "output_format": "png"}),
            *(client.get(path + end) for end in ("/status", "", "/status?preview=1")),
            client.get(f"/v1/requests/{done['request_id']}"),
        ]
        theirs = [
            httpx.post(
                f"{strict.url}/sdapi/v1/txt2img",
                json=small,
                headers={"authorization": f"Basic {basic}"},
                timeout=60,
            ),
            httpx.post(
                f"{strict.url}/openai/v1/images/generations",
                json={"prompt": QUICK["prompt"], "size": "512x512"},
                headers={"authorization": f"Bearer {key}"},
                timeout=60,
            ),
        ]
        vendors = SegmindClient(api_key=key, base_url=f"{strict.url}/v1")
        links = (f"{strict.url}{path}/status", f"{strict.url}{path}")
        with pytest.raises(InferenceFailed, match=WORDS):
            AsyncJob(done["request_id"], *links, {}, vendors).wait()
        vendors._client.close()
        rows = client.get("/inference-request/request-history").json()["data"]
        listed = client.get("/inference-request/generations").json()["data"]
        money = client.get("/v1/credits").json()["data"]["credits"]
    assert done["status"] == "FAILED" and done["code"] == "content_policy"
    assert WORDS in done["error"] and "cost" not in done["metrics"]
    for answer in ours:
        body = answer.json()
        assert (answer.status_code, body["status"]) == (422, "FAILED")
        assert (body["code"], body["error"]) == ("content_policy", done["error"])
    for answer in theirs:
        assert answer.status_code in (400, 422) and WORDS in answer.text
    for answer in (*ours, *theirs):
        assert "image-checker=on" in answer.headers["x-safety"]
        assert not {"x-output-urls", "x-cost"} & set(answer.headers)
        assert "/files/" not in answer.text and "preview" not in answer.text
    events = told_of(4)
    assert {event["type"] for event in events} == {"generation.failed"}
    assert len(events) == 4 and all(WORDS in event["data"]["error"] for event in events)
    assert [(row["model_status"], row["credits_deduction"]) for row in rows] == [("FAILED", 0)] * 4
    assert listed == [] and all(row["generation_url"] is None for row in rows)
    assert money == {"remaining": 9.0, "used": 0.0}
    files = [path for path in strict.data.rglob("*") if path.suffix in (".jpeg", ".png", ".part")]
    assert files == []


def test_the_same_job_shows_a_preview_where_nobody_checks(server: Server) -> None:
    done, preview_was_given = watched(server, server.key)
    assert preview_was_given and done["code"] == "cancelled"
