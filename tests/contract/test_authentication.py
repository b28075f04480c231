"""Contract 1: who may ask. 403, 410 and the two texts of 401."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from segmind import SegmindClient, SegmindError

from imaged.store.accounts import keys
from tests.conftest import cli, until
from tests.contract.curl import curl
from tests.contract.gate import Gate

MISSING = "Missing Authorization or x-api-key in header"
INVALID = "Unauthorized. API key is invalid or may have expired"


def test_the_key_is_read_from_its_header_under_any_case(gate: Gate, tmp_path: Path) -> None:
    for name in ("x-api-key", "X-API-KEY"):
        answer = curl(tmp_path, f"{gate.url}/v1/get-user-credits", "-H", f"{name}: {gate.key}")
        assert answer.status == 200
        assert set(answer.body) == {"credits", "free-credits"}


def test_without_a_key(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEGMIND_API_KEY", raising=False)
    nobody = SegmindClient(base_url=f"{gate.url}/v1")
    with pytest.raises(SegmindError) as caught:
        nobody.run(gate.slug, prompt="x")
    nobody._client.close()
    assert (caught.value.status, caught.value.detail) == (401, MISSING)


def test_a_wrong_key(gate: Gate) -> None:
    for key in ("sk-test", "SG_0123456789abcdef", "x" * 500, "é"):
        with httpx.Client(base_url=gate.url, headers={b"x-api-key": key.encode()}) as client:
            for version in ("v1", "v2"):
                answer = client.post(f"/{version}/{gate.slug}", json={"prompt": "x"})
                assert answer.status_code == 401
                assert answer.json()["error"].startswith(INVALID)


def test_a_key_from_the_environment(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGMIND_API_KEY", gate.key)
    client = SegmindClient(base_url=f"{gate.url}/v1")
    assert client.run(gate.slug, prompt="x")["status"] == "COMPLETED"
    client._client.close()


def test_minted_keys_suit_every_client(gate: Gate) -> None:
    made = gate.make_key()
    assert re.fullmatch(r"(sg_|SG_)[a-zA-Z0-9]{12,}", made)  # what the MCP server demands
    assert re.fullmatch(r"SG_[0-9a-f]{32}", made)


def test_keys_end_by_revoking_only(gate: Gate) -> None:
    key = gate.make_key()
    with gate.client(key) as client:
        assert client.get("/v1/get-user-credits").status_code == 200
        with gate.database.write() as c:
            found = keys.find(c, gate.secret, key)
            assert found is not None
            keys.revoke(c, found.id, time.time())
        # a gateway believes a key for two seconds
        until(lambda: client.get("/v1/get-user-credits").status_code == 401)


def test_bearer_is_for_another_dialect(gate: Gate) -> None:
    headers = {"authorization": f"Bearer {gate.key}"}
    for method, path in (("POST", f"/v2/{gate.slug}"), ("GET", "/v1/get-user-credits")):
        answer = httpx.request(method, gate.url + path, headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (401, MISSING)
    assert httpx.get(f"{gate.url}/openai/v1/models", headers=headers).status_code == 200


def test_a_key_in_the_query_is_no_key(gate: Gate) -> None:
    for name in ("api_key", "x-api-key", "key"):
        answer = httpx.get(f"{gate.url}/v1/get-user-credits", params={name: gate.key})
        assert (answer.status_code, answer.json()["error"]) == (401, MISSING)


def test_a_key_for_some_models(gate: Gate) -> None:
    limited = gate.make_key(models=["micro"])
    data = ("--data", str(gate.settings.data))
    by_alias = cli("keys", "create", "--model", "sketch", *data).stdout.strip()
    assert "active, for sketch only" in cli("keys", "list", *data).stdout
    with gate.client(limited) as client:
        assert client.post("/v2/micro", json={"prompt": "x"}).status_code == 200
        for version in ("v1", "v2"):
            answer = client.post(f"/{version}/{gate.slug}", json={"prompt": "x"})
            assert (answer.status_code, answer.json()["code"]) == (403, "model_forbidden")
    with gate.client(by_alias) as client:
        assert client.post("/v2/sketch", json={"prompt": "x"}).status_code == 200
        assert client.post(f"/v2/{gate.slug}", json={"prompt": "x"}).status_code == 403


def test_a_retired_model(gate: Gate) -> None:
    with gate.client() as client:
        for version in ("v1", "v2"):
            answer = client.post(f"/{version}/sdxl-old", json={"prompt": "x"})
            assert (answer.status_code, answer.json()["code"]) == (410, "model_retired")
            assert f"ask for {gate.slug}" in answer.json()["error"]


def test_what_needs_no_key(gate: Gate) -> None:
    job_id = gate.submit()
    gate.wait_for_end(job_id)
    with gate.client() as client:
        url = client.get(f"/v2/requests/{job_id}").json()["output"]
    assert httpx.get(url).status_code == 200
    for path in ("/v1/models", "/inference-model-information/list", "/v1/health"):
        assert httpx.get(gate.url + path).status_code == 200


def test_checks_come_in_order_at_submit(gate: Gate) -> None:
    """Key, then model, then content type, then parameters, then credits; all before a job."""
    poor = gate.make_key(credits=0.0)
    wrong: dict[str, Any] = {"json": {"prompt": "x", "samples": 9}}
    with gate.client("SG_wrong") as client:
        assert client.post("/v2/no-such-model", **wrong).status_code == 401
    with gate.client(poor) as client:
        for path in ("/v1/no-such-model", "/v2/no-such-model", "/v2/no-such-model/preflight"):
            assert client.post(path, **wrong).status_code == 404
            assert client.post(path, content=b"x").status_code == 404
        assert client.post(f"/v2/{gate.slug}", content=b"x").json()["code"] == "wrong_content_type"
        assert client.post(f"/v2/{gate.slug}", **wrong).status_code == 400
        assert client.post(f"/v2/{gate.slug}", json={"prompt": "x"}).json()["code"] == "no_credits"
