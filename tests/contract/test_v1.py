"""Contract 2: blocking calls, in bytes and in base64, with their headers; 6 and 7: money, rates."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from segmind import SegmindClient

from imaged.moderation.rules import Rules
from imaged.store.accounts import ledger
from tests.contract.conftest import PAGE
from tests.contract.curl import curl
from tests.contract.gate import Gate

JSON = ("-H", "content-type: application/json")


def picture(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def test_bytes(gate: Gate, tmp_path: Path) -> None:
    answer = curl(
        tmp_path,
        f"{gate.url}/v1/{gate.slug}",
        *("-H", f"x-api-key: {gate.key}", *JSON),
        *("-d", '{"prompt": "x", "seed": 7, "samples": 2, "img_width": 896, "img_height": 1152}'),
    )
    assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg")
    image = picture(answer.content)
    assert (image.format, image.size) == ("JPEG", (896, 1152))
    head = answer.headers
    assert float(head["x-remaining-credits"]) > 0 and int(float(head["x-remaining-credits"])) > 0
    assert float(head["x-cost"]) > 0
    assert float(head["x-generation-time"]) == 0.25
    assert head["x-seed-value"] == "7"
    assert len(head["x-request-id"]) == 32
    shape = json.loads(head["x-output-metadata"])
    assert (shape["width"], shape["height"], shape["images"]) == (896, 1152, 2)
    assert len(head["x-output-urls"].split()) == 2


def test_base64(gate: Gate) -> None:
    with gate.client() as client:
        one = client.post(f"/v1/{gate.slug}", json={"prompt": "x", "base64": True})
        two = client.post(f"/v1/{gate.slug}", json={"prompt": "x", "base64": True, "samples": 2})
    assert one.headers["content-type"] == "application/json"
    assert picture(base64.b64decode(one.json()["image"], validate=True)).format == "JPEG"
    assert one.json()["status"] == "Success" and one.json()["infer_time"] == 0.25
    assert not one.json().get("error")
    assert [picture(base64.b64decode(t)).format for t in two.json()["image"]] == ["JPEG"] * 2
    assert float(one.headers["x-remaining-credits"]) > 0


def test_base64_is_made_beside_the_event_loop(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[bool] = []
    encode = base64.b64encode

    def watched(content: bytes) -> bytes:
        encoded.append(asyncio._get_running_loop() is not None)
        return encode(content)

    monkeypatch.setattr(base64, "b64encode", watched)
    with gate.client() as client:
        plain = {"prompt": "x", "samples": 2, "base64": True}
        made = client.post(f"/v1/{gate.slug}", json=plain)
        client.get(f"/v2/requests/{made.headers['x-request-id']}")
        asked = {"prompt": "x", "n": 2, "response_format": "b64_json"}
        client.post("/openai/v1/images/generations", json=asked)
        client.post("/sdapi/v1/txt2img", json={"prompt": "x", "batch_size": 2})
    assert encoded == [False] * 8


def test_png(gate: Gate) -> None:
    body = {"prompt": 'a "house", b: c', "img_width": 512, "img_height": 512}
    with gate.client() as client:
        asked = client.post(f"/v1/{gate.slug}", json={**body, "output_format": "png"})
        accepted = client.post(f"/v1/{gate.slug}", json=body, headers={"accept": "image/png"})
        either = client.post(f"/v1/{gate.slug}", json=body, headers={"accept": "image/*"})
        link = httpx.get(asked.headers["x-output-urls"])
    for answer in (asked, accepted, link):
        assert answer.headers["content-type"] == "image/png"
        assert str(picture(answer.content).info["parameters"]).startswith('a "house", b: c\n')
    assert either.headers["content-type"] == "image/jpeg"


def test_content_types(gate: Gate, tmp_path: Path) -> None:
    url, key = f"{gate.url}/v1/{gate.slug}", ("-H", f"x-api-key: {gate.key}")
    plain = curl(tmp_path, url, *key, "-d", '{"prompt": "x"}')
    assert plain.status == 406 and "Invalid content type" in plain.body["error"]
    form = curl(tmp_path, url, *key, "-F", "prompt=x", "-F", "base64=true", "-F", "samples=2")
    assert form.status == 200 and len(form.body["image"]) == 2
    wrong = curl(tmp_path, url, *key, "-F", "prompt=x", "-F", "seed=many")
    assert wrong.status == 400 and wrong.body["error"].startswith("seed should be")
    for more in (("-F", "prompt=x;filename=x.txt"), ("-F", "prompt=x", "-F", "prompt=y")):
        assert curl(tmp_path, url, *key, *more).status == 400


def test_a_form_that_is_none(gate: Gate) -> None:
    with gate.client() as client:
        for kind, body in (
            ("multipart/form-data", b"x"),
            ("multipart/form-data; boundary=b", b"x"),
            ("multipart/form-data; boundary=b", b"--b\r\n\r\nx"),
            ("multipart/form-data; boundary=b; charset=none", b"--b--"),
            ("multipart/form-data; boundary=" + "b" * 300, b"--b\r\n\xff\r\n\r\nx\r\n--b--"),
        ):
            answer = client.post(f"/v1/{gate.slug}", content=body, headers={"content-type": kind})
            assert answer.status_code == 400, (kind, body, answer.text)


def test_a_wrong_verb(gate: Gate, tmp_path: Path) -> None:
    """The original answers with a page of HTML; ours is JSON like every other error."""
    answer = curl(tmp_path, f"{gate.url}/v1/{gate.slug}")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert answer.body["code"] == "wrong_method"


def test_no_answer_is_a_redirect(gate: Gate) -> None:
    with gate.client() as client:
        for path in (
            f"/v1/{gate.slug}/",
            f"//v1/{gate.slug}",
            "/v1",
            "/docs/",
            f"/v2/{gate.slug}/",
        ):
            assert not client.post(path, json={"prompt": "x"}).is_redirect
            assert not client.get(path).is_redirect


def test_the_vendors_headers_are_fine(gate: Gate) -> None:
    headers = {"user-agent": "segmind-python-sdk/1.3.0", "x-initiator": "SDK-PY", "accept": "*/*"}
    with gate.client() as client:
        assert client.post(f"/v1/{gate.slug}", json={"prompt": "x"}, headers=headers).is_success


def test_the_vendors_sdk_on_v1(gate: Gate) -> None:
    client = SegmindClient(api_key=gate.key, base_url=f"{gate.url}/v1/")
    answer = client.run_sync(gate.slug, prompt="x", base64=False)
    client._client.close()
    assert answer.status_code == 200 and picture(answer.content).format == "JPEG"


def test_a_call_that_takes_too_long(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with Gate(tmp_path / "data", wait_s=0.2).running() as hasty, hasty.client() as client:
        answer = client.post(f"/v1/{hasty.slug}", json={"prompt": "run"})
        assert (answer.status_code, answer.json()["code"]) == (504, "still_running")
        job = client.get(f"/v2/requests/{answer.headers['x-request-id']}/status")
        assert job.json()["status"] in ("QUEUED", "PROCESSING")


def test_web_pages(gate: Gate, tmp_path: Path) -> None:
    """The pages that IMAGED_CORS names may read answers and their headers; by default none may."""
    (tmp_path / "data").mkdir()
    with Gate(tmp_path / "data").running() as closed:
        for running, page, allowed in (
            (gate, PAGE, PAGE),
            (gate, "https://other.example", None),
            (closed, PAGE, None),
        ):
            headers = {"origin": page}
            with running.client() as client:
                made = client.post(f"/v1/{running.slug}", json={"prompt": "x"}, headers=headers)
                job = f"/v2/requests/{made.headers['x-request-id']}"
                asked = [client.get(p, headers=headers) for p in (job, f"{job}/status", "/none")]
            for answer in (made, *asked):
                assert answer.headers.get("access-control-allow-origin") == allowed
            if allowed:
                shown = made.headers["access-control-expose-headers"].lower().split(", ")
                ours = {name for name in made.headers if name.startswith("x-")}
                assert ours <= set(shown) and {"x-safety", "x-engine", "x-cost"} <= ours
        preflight = {"origin": PAGE, "access-control-request-method": "POST"}
        refused = httpx.options(f"{closed.url}/v1/{closed.slug}", headers=preflight)
    assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (405, False)


def test_what_a_page_was_told_is_not_told_to_others(gate: Gate) -> None:
    """The answer to a poll is kept; the headers for one page are not."""
    path = f"/v2/requests/{gate.submit('run')}/status"
    with gate.client() as client:
        for _ in range(3):
            to_page = client.get(path, headers={"origin": PAGE})
            assert to_page.headers["access-control-allow-origin"] == PAGE
            assert to_page.headers.get_list("vary", split_commas=True) == ["Origin"]
            for headers in ({}, {"origin": "https://other.example"}):
                answer = client.get(path, headers=headers)
                assert "access-control-allow-origin" not in answer.headers


# -- money and rates --------------------------------------------------------------------------


def test_only_success_is_charged(gate: Gate) -> None:
    key = gate.make_key(credits=1.0)
    with gate.client(key) as client:
        done = client.post(f"/v1/{gate.slug}", json={"prompt": "x"})
        cost = float(done.headers["x-cost"])
        assert float(done.headers["x-remaining-credits"]) == pytest.approx(1.0 - cost)
        for body in ({"prompt": "fail: no luck"}, {"prompt": ""}, {"prompt": "x", "seed": "y"}):
            assert not client.post(f"/v1/{gate.slug}", json=body).is_success
        left = client.get("/v1/get-user-credits").json()
        data = client.get("/v1/credits").json()["data"]["credits"]
    assert left == {"credits": pytest.approx(1.0 - cost), "free-credits": 0.0}
    assert data == {"remaining": pytest.approx(1.0 - cost), "used": pytest.approx(cost)}


def test_what_is_left_is_told_without_adding_up_what_was_used(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ledger, "used")
    with gate.client(gate.make_key(credits=1.0)) as client:
        assert client.get("/v1/get-user-credits").json()["credits"] == 1.0


def test_the_price_is_held_while_a_job_is_open(gate: Gate) -> None:
    key = gate.make_key(credits=0.009)
    with gate.client(key) as client:
        first = client.post(f"/v2/{gate.slug}", json={"prompt": "hold"})
        assert first.is_success
        second = client.post(f"/v2/{gate.slug}", json={"prompt": "x"})
        assert (second.status_code, second.json()["code"]) == (406, "no_credits")
        assert "costs 0.008000 and 0.001000 are left" in second.json()["error"]
        client.delete(first.json()["response_url"])
        assert client.get("/v1/get-user-credits").json()["credits"] == 0.009


def test_rates_are_told_and_kept(gate: Gate) -> None:
    key = gate.make_key(rpm=2)
    with gate.client(key) as client:
        answers = [client.post(f"/v2/{gate.slug}", json={"prompt": "x"}) for _ in range(3)]
        polls = [client.get(answers[0].json()["status_url"]) for _ in range(20)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert [a.headers.get("x-rate-limit-remaining") for a in answers] == ["1", "0", None]
    assert answers[0].headers["x-rate-limit-limit"] == "2"
    assert 1 <= int(answers[2].headers["retry-after"]) <= 31
    for answer in answers:
        at = datetime.fromisoformat(answer.headers["x-rate-limit-reset-at-utc"])
        assert time.time() < at.timestamp() < time.time() + 61
    assert {p.status_code for p in polls} == {200}  # polls are never limited


def test_no_prompt_of_a_key_that_is_too_fast_is_judged(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged, judge = list[str](), Rules.judge

    def noted(self: Rules, text: str) -> Any:
        judged.append(text)
        return judge(self, text)

    monkeypatch.setattr(Rules, "judge", noted)
    with gate.client(gate.make_key(rpm=2)) as client:

        def post(prompt: str, **headers: str) -> httpx.Response:
            return client.post(f"/v2/{gate.slug}", json={"prompt": prompt}, headers=headers)

        under = {"idempotency-key": "one"}
        first, refused = post("a", **under), post("naked child")
        repeat, late = post("a", **under), [post("c"), post("d", **{"idempotency-key": "two"})]
        status = client.get(refused.json()["status_url"])
    assert (status.status_code, status.json()["code"]) == (422, "content_policy")
    assert repeat.text == first.text and repeat.headers["idempotent-replayed"] == "true"
    assert [answer.status_code for answer in late] == [429, 429]
    assert all(1 <= int(answer.headers["retry-after"]) <= 31 for answer in late)
    assert judged == ["a", "naked child"]
