"""Contract 3: submit, status, result and poll_url in every state; 5: errors; 9: blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from segmind import InferenceFailed, InferenceTimeout, SegmindClient, SegmindError

from imaged.gateway.read.job_reader import JobReader
from imaged.gateway.submit.admission import Admission
from tests.conftest import until
from tests.contract.gate import Gate
from tests.contract.outcomes import BLOCKED

LINKS = ("poll_url", "status_url", "response_url")


@pytest.fixture
def sdk(gate: Gate) -> Iterator[SegmindClient]:
    client = SegmindClient(api_key=gate.key, base_url=f"{gate.url}/v1")
    yield client
    client._client.close()


def ask(gate: Gate, job_id: str, key: str | None = None) -> dict[str, httpx.Response]:
    """Status, result and poll_url of a job."""
    paths = {
        "status": f"/v2/requests/{job_id}/status",
        "result": f"/v2/requests/{job_id}",
        "poll": f"/v1/requests/{job_id}",
    }
    with gate.client(key) as client:
        return {name: client.get(path) for name, path in paths.items()}


def wait_for(gate: Gate, job_id: str, state: str) -> None:
    until(lambda: ask(gate, job_id)["status"].json()["status"] == state)


def test_submit(gate: Gate) -> None:
    with gate.client() as client:
        answer = client.post(f"/v2/{gate.slug}", json={"prompt": "x", "refiner": True})
    body = answer.json()
    assert answer.status_code == 200 and body["status"] == "QUEUED"
    assert re.fullmatch(r"[0-9a-f]{32}", body["request_id"])
    for name in LINKS:
        assert body[name].startswith(f"{gate.url}/v") and body["request_id"] in body[name]
        assert httpx.get(body[name], headers={"x-api-key": gate.key}).is_success
    assert body["warnings"] == ["unknown field ignored: refiner"]
    assert answer.headers["x-request-id"] == body["request_id"]


def test_every_submit_is_a_job_of_its_own(gate: Gate) -> None:
    first, second = gate.submit("hold", seed=5), gate.submit("hold", seed=5)
    assert first != second
    with gate.client() as client:
        client.delete(f"/v2/requests/{first}")
    states = [ask(gate, job_id)["status"].json()["status"] for job_id in (first, second)]
    assert states == ["FAILED", "QUEUED"]


def test_links_have_the_public_origin(gate: Gate) -> None:
    with gate.client() as client:
        answer = client.post(
            f"/v2/{gate.slug}", json={"prompt": "x"}, headers={"host": "images.example:8443"}
        )
    assert answer.json()["status_url"].startswith("http://images.example:8443/v2/requests/")


def test_queued(gate: Gate) -> None:
    job_id = gate.submit("hold")
    for answer in ask(gate, job_id).values():
        body = answer.json()
        assert (answer.status_code, body["status"], body["metrics"]) == (200, "QUEUED", {})
        assert body["request_id"] == job_id
        assert body["status_url"] and body["response_url"]


def test_processing(gate: Gate) -> None:
    job_id = gate.submit("run")
    wait_for(gate, job_id, "PROCESSING")
    for answer in ask(gate, job_id).values():
        body = answer.json()
        assert (answer.status_code, body["status"]) == (200, "PROCESSING")
        assert body["steps"] == 25 and "output" not in body
    with gate.client() as client:
        client.delete(f"/v2/requests/{job_id}")


def test_completed(gate: Gate) -> None:
    job_id = gate.submit("a house", samples=2, seed=5)
    assert gate.wait_for_end(job_id).json()["status"] == "COMPLETED"
    answers = {name: answer.json() for name, answer in ask(gate, job_id).items()}
    assert {body["status"] for body in answers.values()} == {"COMPLETED"}
    metrics = answers["status"]["metrics"]
    assert metrics["inference_time"] == 0.25
    assert metrics["cost"] > 0 and metrics["remaining_credits"] > 0
    assert metrics["queue_time"] >= 0 and metrics["total_time"] > 0
    assert "retry_count" not in metrics and "output" not in answers["status"]
    result = answers["result"]
    assert isinstance(result["output"], str)
    assert result["output"] == result["images"][0]["url"] == answers["poll"]["output"]
    assert [image["seed"] for image in result["images"]] == [5, 6]
    for image in result["images"]:
        assert image["content_type"] == "image/jpeg"
        assert image["file_name"].endswith(".jpeg") and image["file_size"] > 0
        assert httpx.get(image["url"]).headers["content-type"] == "image/jpeg"
    assert (result["seed"], result["prompt"]) == ("5", "a house")
    assert not result.get("error") and result["timings"]


def test_base64_on_v2(gate: Gate) -> None:
    job_id = gate.submit(base64=True, samples=2)
    gate.wait_for_end(job_id)
    images = ask(gate, job_id)["result"].json()["images"]
    assert [image["base64"][:4] for image in images] == ["/9j/"] * 2


def test_failed(gate: Gate) -> None:
    job_id = gate.submit("fail: blocked by content policy")
    gate.wait_for_end(job_id)
    for answer in ask(gate, job_id).values():
        body = answer.json()
        assert (answer.status_code, body["status"]) == (422, "FAILED")
        assert body["error"] == "blocked by content policy"
        assert set(body["metrics"]) == {"inference_time", "queue_time", "total_time"}


def test_cancelled_is_failed_to_clients_of_the_original(gate: Gate) -> None:
    job_id = gate.submit("hold")
    with gate.client() as client:
        assert client.delete(f"/v2/requests/{job_id}").status_code == 200
    for answer in ask(gate, job_id).values():
        assert (answer.status_code, answer.json()["status"]) == (422, "FAILED")
        assert answer.json()["code"] == "cancelled"


def test_unknown_and_foreign(gate: Gate) -> None:
    job_id, stranger = gate.submit(), gate.make_key()
    for asked, key in (("0" * 32, None), ("x", None), (job_id, stranger)):
        for answer in ask(gate, asked, key).values():
            assert answer.status_code == 404
            assert answer.json()["error"] == f"Request {asked} not found"


def test_a_poll_that_was_answered_before_is_answered_to_its_owner_only(gate: Gate) -> None:
    """The answer is kept until somebody writes: not for another key, nor past the end."""
    key = gate.make_key(name="passing", rpm=1000)
    with gate.client(key) as own:
        job_id = own.post(f"/v2/{gate.slug}", json={"prompt": "run"}).json()["request_id"]
        path = f"/v2/requests/{job_id}/status"
        until(lambda: own.get(path).json()["status"] == "PROCESSING", every_s=0.05)
        for _ in range(3):
            assert own.get(path).json()["request_id"] == job_id
            with gate.client(gate.make_key(name="stranger")) as other:
                assert other.get(path).status_code == 404
            assert httpx.get(f"{gate.url}{path}").status_code == 401
        assert own.delete(f"/v2/requests/{job_id}").status_code == 200
        assert own.get(path).json()["code"] == "cancelled"


def test_an_hour_later(tmp_path: Any) -> None:
    (tmp_path / "data").mkdir()
    with Gate(tmp_path / "data").running() as own:
        job_id = own.submit(samples=2)
        own.wait_for_end(job_id)
        url = ask(own, job_id)["result"].json()["output"]
        own.expire_everything()
        assert {a.status_code for a in ask(own, job_id).values()} == {404}
        assert httpx.get(url).status_code == 404
        with own.client() as client:  # what was asked is still listed
            row = client.get(f"/inference-request/request-history/{job_id}").json()
            listed = client.get("/inference-request/generations").json()["data"]
        assert (row["model_status"], row["generation_url"]) == ("COMPLETED", None)
        assert row["credits_deduction"] > 0 and row["request_body"]["prompt"] == "a house"
        assert [r["request_id"] for r in listed] == [job_id] * 2


# -- the vendor's SDK -------------------------------------------------------------------------


def test_sdk_run(sdk: SegmindClient, gate: Gate) -> None:
    result = sdk.run(gate.slug, prompt="a house", scheduler="DPM++ 2M Karras", base64=False)
    assert result["status"] == "COMPLETED"
    assert result["metrics"]["inference_time"] == 0.25
    assert httpx.get(result.get("output")).status_code == 200


def test_sdk_base_urls(gate: Gate) -> None:
    for base in (f"{gate.url}/v1", f"{gate.url}/v1/", gate.url):
        client = SegmindClient(api_key=gate.key, base_url=base)
        assert client.submit_async(gate.slug, prompt="x").wait(interval=0.02)["output"]
        client._client.close()


def test_sdk_behind_a_prefix(tmp_path: Path) -> None:
    """A proxy serves the API below a path of another host; IMAGED_PUBLIC_URL names it."""
    (tmp_path / "data").mkdir()
    asked: list[str] = []
    with Gate(tmp_path / "data", public_url="http://h.example/segmind").running() as own:

        def proxy(request: httpx.Request) -> None:
            asked.append(request.url.path)
            assert request.url.host == "h.example"
            path = request.url.path.removeprefix("/segmind")
            request.url = httpx.URL(own.url).copy_with(path=path)

        client = SegmindClient(api_key=own.key, base_url="http://h.example/segmind/v1")
        client._client.event_hooks = {"request": [proxy]}
        output = client.submit_async(own.slug, prompt="x").wait(interval=0.02)["output"]
        assert client.run_sync(own.slug, prompt="x").status_code == 200
        client._client.close()
    assert output.startswith("http://h.example/segmind/files/")
    assert asked[0] == f"/segmind/v2/{own.slug}" and asked[-1] == f"/segmind/v1/{own.slug}"
    assert all(path.startswith("/segmind/v") for path in asked)


def test_a_refused_prompt(gate: Gate) -> None:
    """An ordinary FAILED job in every place, with words that clients look for, and no charge."""
    client = SegmindClient(api_key=gate.make_key(credits=1.0), base_url=f"{gate.url}/v1")
    with pytest.raises(InferenceFailed) as caught:
        client.run(gate.slug, prompt=BLOCKED)
    with pytest.raises(SegmindError) as refused:
        client.run_sync(gate.slug, prompt=BLOCKED)
    client._client.close()
    body = caught.value.status_body
    assert "content policy" in caught.value.detail and refused.value.detail == caught.value.detail
    assert (body["status"], body["code"], refused.value.status) == ("FAILED", "content_policy", 422)
    assert "cost" not in body["metrics"]
    for answer in ask(gate, body["request_id"], client.api_key).values():
        assert (answer.status_code, answer.json()["error"]) == (422, caught.value.detail)
    with gate.client(client.api_key) as http:
        assert http.get("/v1/get-user-credits").json()["credits"] == 1.0


def test_sdk_failed(sdk: SegmindClient, gate: Gate) -> None:
    with pytest.raises(InferenceFailed) as caught:
        sdk.run(gate.slug, prompt="fail: blocked by content policy")
    assert caught.value.detail == "blocked by content policy"
    assert caught.value.status_body["status"] == "FAILED"
    job = sdk.submit_async(gate.slug, prompt="fail: again")
    gate.wait_for_end(job.request_id)
    assert job.result()["error"] == "again"


def test_sdk_timeout(sdk: SegmindClient, gate: Gate) -> None:
    job = sdk.submit_async(gate.slug, prompt="hold")
    with pytest.raises(InferenceTimeout) as caught:
        job.wait(timeout=0.1, interval=0.05)
    assert caught.value.request_id == job.request_id


@pytest.mark.parametrize(
    ("slug", "params", "status", "words"),
    [
        ("", {"prompt": "x", "samples": 9}, 400, "samples should be"),
        ("", {}, 400, "prompt is mandatory"),
        ("", {"prompt": "x", "scheduler": "none"}, 400, "scheduler should be one of"),
        ("no-such-model", {"prompt": "x"}, 404, "no model"),
        ("sdxl-old", {"prompt": "x"}, 410, "not served any more"),
    ],
)
def test_sdk_refusals(
    sdk: SegmindClient, gate: Gate, slug: str, params: Any, status: int, words: str
) -> None:
    for call in (sdk.run, sdk.run_sync, sdk.submit_async):
        with pytest.raises(SegmindError) as caught:
            call(slug or gate.slug, **params)
        assert caught.value.status == status and words in caught.value.detail


def test_sdk_without_credits(gate: Gate) -> None:
    poor = SegmindClient(api_key=gate.make_key(credits=0), base_url=f"{gate.url}/v1")
    for call in (poor.run, poor.run_sync):
        with pytest.raises(SegmindError) as caught:
            call(gate.slug, prompt="x")
        assert caught.value.status == 406 and "credits" in caught.value.detail
    poor._client.close()


def test_sdk_forwards_timeout_and_interval(sdk: SegmindClient, gate: Gate) -> None:
    assert sdk.run(gate.slug, prompt="x", timeout=5, interval=1)["status"] == "COMPLETED"


def test_polling_after_the_end_and_again(sdk: SegmindClient, gate: Gate) -> None:
    job = sdk.submit_async(gate.slug, prompt="x")
    first = job.wait(interval=0.02)
    assert job.status()["status"] == "COMPLETED"
    assert job.result()["images"] == first["images"]


def test_every_error_has_one_shape(gate: Gate) -> None:
    with gate.client() as client:
        for method, path, content in (
            ("GET", "/nowhere", b""),
            ("GET", f"/v1/{gate.slug}", b""),
            ("POST", f"/v1/{gate.slug}", b"{"),
            ("POST", "/v1/none", b"{}"),
            ("GET", "/v2/requests/none", b""),
        ):
            answer = client.request(
                method, path, content=content, headers={"content-type": "application/json"}
            )
            assert answer.headers["content-type"] == "application/json"
            assert set(answer.json()) == {"error", "code"}
            assert isinstance(answer.json()["error"], str)


def test_the_servers_own_faults_are_json(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: Exception) -> tuple[int, Any]:
        async def catalogue(self: Admission) -> Any:
            raise error

        monkeypatch.setattr(Admission, "catalogue", catalogue)
        answer = httpx.get(f"{gate.url}/v1/models")
        return answer.status_code, answer.json()

    text = {"error": "Internal server error", "code": "error"}
    assert failing(RuntimeError("secret words")) == (500, text)
    said = httpx.get(f"{gate.url}/v1/models", headers={"connection": "keep-alive"})
    assert said.headers["connection"] == "close"  # no client sends its next request into a hang-up
    status, body = failing(sa.exc.OperationalError("SELECT secret", {}, Exception()))
    assert (status, body["code"]) == (502, "unavailable") and "secret" not in body["error"]


def test_faults_behind_polls_are_json(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: Exception) -> tuple[int, Any]:
        async def wait_for_end(*_: Any) -> Any:
            raise error

        monkeypatch.setattr(JobReader, "wait_for_end", wait_for_end)
        with gate.client() as client:
            answer = client.get(f"/v2/requests/{'0' * 32}/status")
        return answer.status_code, answer.json()

    text = {"error": "Internal server error", "code": "error"}
    assert failing(RuntimeError("secret words")) == (500, text)
    status, body = failing(sa.exc.OperationalError("SELECT secret", {}, Exception()))
    assert (status, body["code"]) == (502, "unavailable") and "secret" not in body["error"]
