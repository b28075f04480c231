"""A job's events over HTTP: order, coming back, owners, the end; and our SDK on top of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from httpx_sse import ServerSentEvent, connect_sse

import imaged
from imaged.client import calls
from imaged.client import events as client_events
from tests import conftest
from tests.conftest import SLUG, Server, cli

QUICK = {**conftest.QUICK, "num_inference_steps": 20}  # long enough to tell of
JOB = {**QUICK, "seed": 3}


def path(job_id: str) -> str:
    return f"/v2/requests/{job_id}/events"


def follow(client: httpx.Client, job_id: str, last_id: str = "") -> Iterator[ServerSentEvent]:
    """The stream's events until the server ends it."""
    headers = {"last-event-id": last_id} if last_id else {}
    with connect_sse(client, "GET", path(job_id), headers=headers) as source:
        yield from (message for message in source.iter_sse() if message.data)


@pytest.fixture(scope="module")
def told(server: Server) -> tuple[str, list[ServerSentEvent]]:
    """A job that was followed from its submit to its end."""
    job_id = server.submit(**JOB)
    with server.client() as client:
        return job_id, list(follow(client, job_id))


def test_the_whole_stream(server: Server, told: tuple[str, list[ServerSentEvent]]) -> None:
    job_id, messages = told
    kinds = [m.event for m in messages]
    states = [m.json()["status"] for m in messages if "status" in m.json()]
    assert states in (["QUEUED", "PROCESSING", "COMPLETED"], ["PROCESSING", "COMPLETED"])
    assert kinds[-1] == "done" and kinds.count("done") == 1 and "progress" in kinds
    with server.client() as client:
        assert messages[-1].json() == client.get(f"/v2/requests/{job_id}/status").json()
    seen = [m.id.split(".") for m in messages]
    order = [(["QUEUED", "PROCESSING", "COMPLETED"].index(s), *map(int, n)) for s, *n in seen]
    assert order == sorted(set(order))  # each id says more than the one before
    steps = [m.json()["step"] for m in messages if m.event == "progress"]
    assert steps == sorted(set(steps)) and steps[-1] == 20


def test_coming_back(server: Server, told: tuple[str, list[ServerSentEvent]]) -> None:
    job_id, messages = told
    done = messages[-1]
    running = next(m for m in messages if m.event == "progress")
    with server.client() as client:
        again = list(follow(client, job_id, running.id))
        assert [m.event for m in again][-1] == "done" and again[-1].json() == done.json()
        assert "state" not in [m.event for m in again]
        after = client.get(path(job_id), headers={"last-event-id": done.id})
        assert (after.status_code, after.content) == (204, b"")
        assert client.head(path(job_id)).headers["content-type"].startswith("text/event-stream")
        assert client.get(path(job_id)).headers["cache-control"] == "no-store"


def test_only_for_the_owner(server: Server, told: tuple[str, list[ServerSentEvent]]) -> None:
    job_id, _ = told
    other = cli("keys", "create", "--name", "eve", "--data", str(server.data)).stdout.strip()
    with server.client(other) as client:
        answer = client.get(path(job_id))
    assert answer.status_code == 404
    assert answer.json() == {"error": f"Request {job_id} not found", "code": "unknown_request"}


def test_a_cancel_ends_the_stream(server: Server) -> None:
    job_id = server.submit(num_inference_steps=100, samples=4)
    messages = []
    with server.client() as client, server.client() as second:
        for message in follow(client, job_id):
            messages.append(message)
            if message.event == "progress":
                second.delete(f"/v2/requests/{job_id}")
    assert [m.event for m in messages if m.event != "preview"][-2:] == ["progress", "done"]
    body = messages[-1].json()
    assert (body["status"], body["code"]) == ("FAILED", "cancelled")


# -- our SDK ----------------------------------------------------------------------------------


class Breaking(httpx.HTTPTransport):
    """A line that breaks in the middle of each stream, after so many events."""

    def __init__(self, events: int) -> None:
        super().__init__()
        self.events, self.streams, self.last_ids = events, 0, list[str | None]()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if request.url.path.endswith("/events"):
            self.streams += 1
            self.last_ids.append(request.headers.get("last-event-id"))
            stream: Any = response.stream
            response.stream = _Broken(stream, self.events)
        return response


class _Broken(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream, events: int) -> None:
        self._stream, self._left = stream, events

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            self._left -= chunk.count(b"event: ")
            if self._left < 0:
                raise httpx.ReadError("the line broke")
            yield chunk

    def close(self) -> None:
        self._stream.close()


def test_our_client_goes_on_where_the_line_broke(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_events.Stream, "rest_s", 0.05)
    with imaged.Client(server.key, server.url) as ours:
        ours.http.close()
        line = Breaking(events=1)
        ours.http = httpx.Client(
            base_url=server.url, transport=line, headers=calls.headers(server.key)
        )
        job = ours.submit_async(SLUG, **JOB)
        events = list(job.events(timeout=120))
    assert events[-1].kind == "done" and events[-1].data["status"] == "COMPLETED"
    told = [json.dumps([e.kind, e.data]) for e in events]
    assert len(set(told)) == len(told) >= 3  # nothing twice
    assert line.streams >= 3
    assert line.last_ids[0] is None and None not in line.last_ids[1:]


def test_our_client_gives_up_in_the_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_events.Stream, "rest_s", 0.0)
    tries: list[int] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        tries.append(1)
        if len(tries) % 2:
            return httpx.Response(503, json={"error": "later", "code": "unavailable"})
        raise httpx.ConnectError("nobody is there")

    answer = {"request_id": "a" * 32, "status_url": "http://x/s", "response_url": "http://x/r"}
    with imaged.Client(server.key, server.url) as ours:
        ours.http.close()
        ours.http = httpx.Client(transport=httpx.MockTransport(refuse))
        job = imaged.Job(ours, answer)
        with pytest.raises(imaged.ImagedError, match="broke off 5 times"):
            list(job.events())
        assert len(tries) == client_events.ATTEMPTS
        with pytest.raises(imaged.InferenceTimeout):
            list(job.events(timeout=0))
    with imaged.Client(server.key, server.url) as ours:
        job = imaged.Job(ours, {**answer, "response_url": f"{server.url}/v2/requests/{'0' * 32}"})
        with pytest.raises(imaged.ImagedError, match="not found") as caught:
            list(job.events())
        assert caught.value.status == 404


def test_wait_with_a_bar(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    with imaged.Client(server.key, server.url) as ours:
        job = ours.submit_async(SLUG, **QUICK)
        assert job.wait(timeout=120, progress=True)["status"] == "COMPLETED"
        shown = capfd.readouterr().err
        assert "completed" in shown and "20/20" in shown
        slow = ours.submit_async(SLUG, **{**QUICK, "num_inference_steps": 100, "samples": 4})
        with pytest.raises(imaged.InferenceTimeout):
            slow.wait(timeout=0.2, progress=True)
        slow.cancel()
        with pytest.raises(imaged.InferenceFailed, match="cancelled"):
            slow.wait(progress=True)


def test_our_async_client_follows_too(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> tuple[list[imaged.Event], dict[str, Any]]:
        async with imaged.AsyncClient(server.key, server.url) as ours:
            job = await ours.submit_async(SLUG, **QUICK)
            events = [event async for event in job.events()]
            return events, await job.wait(progress=True)

    events, result = asyncio.run(main())
    counts = [e.data["unet_calls_done"] for e in events if e.kind == "progress"]
    assert counts == sorted(set(counts)) and counts[-1] == 20
    assert events[-1].kind == "done"
    assert result["status"] == "COMPLETED"
    assert "20/20" in capfd.readouterr().err
