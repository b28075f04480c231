"""The whole platform over HTTP: states, pictures, money, owners, and every wrong input."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import subprocess
import sys
import time
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import httpx
import pytest
from PIL import Image

from imaged import __version__
from imaged.params.knobs import KNOBS
from tests.conftest import QUICK, SLUG, Server, cli, imaged
from tests.unit.test_params import WRONG


def picture(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def credits(server: Server) -> float:
    with server.client() as client:
        return float(client.get("/v1/get-user-credits").json()["credits"])


@pytest.fixture(scope="module")
def completed(server: Server) -> dict[str, Any]:
    """One v2 job with two samples, run to its end: its status and result bodies."""
    before = credits(server)
    job_id = server.submit(samples=2, seed=41, prompt_report=True)
    status = server.wait(job_id)
    with server.client() as client:
        result = client.get(f"/v2/requests/{job_id}").json()
        polled = client.get(f"/v1/requests/{job_id}").json()
    return {"id": job_id, "status": status, "result": result, "polled": polled, "before": before}


# -- v2 ---------------------------------------------------------------------------------------


def test_submit_answers_at_once_with_absolute_urls(server: Server) -> None:
    with server.client() as client:
        answer = client.post(f"/v2/{SLUG}", json={**QUICK, "refiner": True})
        body = answer.json()
        client.delete(f"/v2/requests/{body['request_id']}")
    assert answer.status_code == 200
    assert body["status"] == "QUEUED"
    job_id = body["request_id"]
    assert len(job_id) == 32 and set(job_id) <= set("0123456789abcdef")
    assert body["status_url"] == f"{server.url}/v2/requests/{job_id}/status"
    assert body["response_url"] == f"{server.url}/v2/requests/{job_id}"
    assert body["poll_url"] == f"{server.url}/v1/requests/{job_id}"
    assert body["warnings"] == ["unknown field ignored: refiner"]


def test_completed_status_and_result(server: Server, completed: dict[str, Any]) -> None:
    status, result = completed["status"], completed["result"]
    assert status["status"] == result["status"] == completed["polled"]["status"] == "COMPLETED"
    assert "output" not in status
    assert set(status["metrics"]) == {
        "inference_time",
        "queue_time",
        "total_time",
        "cost",
        "remaining_credits",
    }
    assert status["metrics"]["cost"] == pytest.approx(0.008 * 0.0625 * 6 / 25 * 2)
    spent = completed["before"] - status["metrics"]["remaining_credits"]
    assert spent == pytest.approx(status["metrics"]["cost"])
    assert result["output"] == result["images"][0]["url"] == completed["polled"]["output"]
    assert [image["seed"] for image in result["images"]] == [41, 42]
    assert result["seed"] == "41"
    assert result["checkpoint"] == "micro"
    with server.client() as client:
        told = client.post(f"/v2/{SLUG}/preflight", json=QUICK).json()
    assert result["prompts"] == told["prompts"] and told["prompts"]["prompt"]["texts"]


def test_files_are_pictures_behind_signed_links(completed: dict[str, Any]) -> None:
    for image in completed["result"]["images"]:
        answer = httpx.get(image["url"])  # without a key
        assert answer.status_code == 200
        assert answer.headers["content-type"] == image["content_type"] == "image/jpeg"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert len(answer.content) == image["file_size"]
        assert picture(answer.content).size == (256, 256)
    first, second = completed["result"]["images"]
    assert httpx.get(first["url"]).content != httpx.get(second["url"]).content


def test_a_changed_link_is_no_link(completed: dict[str, Any]) -> None:
    url = urlsplit(completed["result"]["output"])
    query = dict(parse_qsl(url.query))
    other = completed["result"]["images"][1]["file_name"]
    for path, changes in (
        (url.path, {"exp": str(int(query["exp"]) + 1)}),
        (url.path, {"exp": "1"}),
        (url.path, {"exp": "x"}),
        (url.path, {"sig": query["sig"][:-1] + ("0" if query["sig"][-1] != "0" else "1")}),
        (url.path, {"sig": ""}),
        (url.path, {"sig": "\u00e9"}),
        (f"/files/{other}", {}),
        ("/files/..%2fsecret", {}),
        ("/files/%00", {}),
    ):
        changed = f"{url.scheme}://{url.netloc}{path}?{urlencode({**query, **changes})}"
        assert httpx.get(changed).status_code == 404


def test_long_poll_returns_with_the_end(server: Server) -> None:
    job_id = server.submit()
    with server.client() as client:
        body = client.get(f"/v2/requests/{job_id}/status", params={"wait": 60}).json()
        assert body["status"] == "COMPLETED"
        wrong = client.get(f"/v2/requests/{job_id}/status", params={"wait": "soon"})
    assert (wrong.status_code, wrong.json()["code"]) == (400, "bad_parameter")


def test_progress_reaches_the_status(server: Server) -> None:
    job_id = server.submit(num_inference_steps=60)
    seen = []
    with server.client() as client:
        while (body := client.get(f"/v2/requests/{job_id}/status").json())["status"] != "COMPLETED":
            if body["status"] == "PROCESSING":
                assert 0 <= body["step"] <= body["steps"] == 60
                seen.append(body["step"])
    assert len(set(seen)) >= 2 and seen == sorted(seen)


def test_cancel_ends_the_job_and_gives_the_money_back(server: Server) -> None:
    before = credits(server)
    job_id = server.submit(num_inference_steps=100, samples=4)
    assert credits(server) < before
    with server.client() as client:
        cancelled = client.delete(f"/v2/requests/{job_id}")
        assert cancelled.status_code == 200
        status = client.get(f"/v2/requests/{job_id}/status")
        result = client.get(f"/v2/requests/{job_id}")
    for answer in (status, result):
        assert answer.status_code == 422
        assert answer.json()["status"] == "FAILED"
        assert answer.json()["code"] == "cancelled"
        assert "cost" not in answer.json()["metrics"]
    assert credits(server) == before


# -- v1 ---------------------------------------------------------------------------------------


def test_v1_gives_bytes_and_headers(server: Server) -> None:
    with server.client() as client:
        answer = client.post(f"/v1/{SLUG}", json={**QUICK, "seed": 41, "samples": "2"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/jpeg"
    assert picture(answer.content).size == (256, 256)
    assert answer.headers["x-seed-value"] == "41"
    assert answer.headers["x-checkpoint"] == "micro"
    assert answer.headers["x-determinism"] == "exact"
    assert answer.headers["x-engine"] == __version__
    assert answer.headers["x-dtype"] == "float32"
    assert re.fullmatch(
        r"CPU [A-Z0-9]+, .+ [0-9a-f]{8}, \d+ threads, torch [\d.]+\+?\w*",
        unquote(answer.headers["x-device"]),
    )
    assert float(answer.headers["x-cost"]) == pytest.approx(0.008 * 0.0625 * 6 / 25 * 2)
    assert float(answer.headers["x-remaining-credits"]) > 0
    assert float(answer.headers["x-generation-time"]) > 0
    assert json.loads(answer.headers["x-output-metadata"])["width"] == 256
    assert len(answer.headers["x-output-urls"].split()) == 2
    assert httpx.get(answer.headers["x-output-urls"].split()[0]).content == answer.content


def test_v1_base64(server: Server) -> None:
    with server.client() as client:
        answer = client.post(f"/v1/{SLUG}", json={**QUICK, "base64": True, "seed": 5})
        body = answer.json()
        again = client.get(f"/v2/requests/{body['request_id']}").json()
    assert picture(base64.b64decode(body["image"])).size == (256, 256)
    assert body["status"] == "Success"
    assert again["images"][0]["base64"] == body["image"]


# -- who may ask, and for what ----------------------------------------------------------------


def test_keys(server: Server) -> None:
    for headers, code in (
        ({}, "key_missing"),
        ({"x-api-key": "SG_" + "0" * 32}, "key_invalid"),
        ({"authorization": f"Bearer {server.key}"}, "key_missing"),
    ):
        for method, path in (
            ("POST", f"/v1/{SLUG}"),
            ("POST", f"/v2/{SLUG}"),
            ("GET", "/v2/requests/x/status"),
            ("GET", "/v2/requests/x/events"),
            ("GET", "/v2/requests/x"),
            ("GET", "/v1/requests/x"),
            ("DELETE", "/v2/requests/x"),
            ("GET", "/v1/get-user-credits"),
        ):
            answer = httpx.request(method, server.url + path, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (401, code), (method, path)


def test_another_key_sees_nothing(server: Server, completed: dict[str, Any]) -> None:
    other = cli("keys", "create", "--name", "other", "--data", str(server.data)).stdout.strip()
    job = f"/v2/requests/{completed['id']}"
    with server.client(other) as client:
        for method, path in (
            ("GET", f"{job}/status"),
            ("GET", f"{job}/events"),
            ("GET", job),
            ("DELETE", job),
            ("GET", f"/v1/requests/{completed['id']}"),
        ):
            answer = client.request(method, path)
            assert answer.status_code == 404
            assert answer.json()["error"] == f"Request {completed['id']} not found"


def test_poor_key_is_refused_and_not_charged(server: Server) -> None:
    poor = cli("keys", "create", "--credits", "0.0001", "--data", str(server.data)).stdout.strip()
    with server.client(poor) as client:
        for version in ("v1", "v2"):
            answer = client.post(f"/{version}/{SLUG}", json=QUICK)
            assert (answer.status_code, answer.json()["code"]) == (406, "no_credits")
            assert "credits" in answer.json()["error"]
        assert client.get("/v1/get-user-credits").json()["credits"] == 0.0001


def test_rate_limit_says_when_to_come_back(server: Server) -> None:
    slow = cli("keys", "create", "--rpm", "1", "--data", str(server.data)).stdout.strip()
    with server.client(slow) as client:
        first = client.post(f"/v2/{SLUG}", json=QUICK)
        second = client.post(f"/v2/{SLUG}", json=QUICK)
        client.delete(f"/v2/requests/{first.json()['request_id']}")
    assert (first.status_code, second.status_code) == (200, 429)
    assert 1 <= int(second.headers["retry-after"]) <= 60
    assert "T" in second.headers["x-rate-limit-reset-at-utc"]


def test_unknown_things(server: Server) -> None:
    with server.client() as client:
        for method, path, status, code in (
            ("POST", "/v1/no-such-model", 404, "unknown_model"),
            ("POST", "/v2/no-such-model", 404, "unknown_model"),
            ("GET", "/v2/requests/" + "0" * 32, 404, "unknown_request"),
            ("GET", "/v2/requests/" + "0" * 32 + "/status", 404, "unknown_request"),
            ("GET", "/v2/requests/" + "0" * 32 + "/events", 404, "unknown_request"),
            ("GET", "/v1/requests/" + "0" * 32, 404, "unknown_request"),
            ("GET", "/nowhere", 404, "unknown_path"),
            ("GET", f"/v1/{SLUG}", 405, "wrong_method"),
            ("PUT", f"/v2/{SLUG}", 405, "wrong_method"),
            ("POST", "/v2/requests/x/status", 405, "wrong_method"),
            ("POST", "/v2/requests/x/events", 405, "wrong_method"),
            ("POST", "/v1/models", 405, "wrong_method"),
            ("POST", "/v1/get-user-credits", 405, "wrong_method"),
            ("PUT", "/v2/requests/x", 405, "wrong_method"),
            ("POST", f"/v1/{SLUG}/", 404, "unknown_path"),
        ):
            answer = client.request(method, path, json={} if method in ("POST", "PUT") else None)
            assert (answer.status_code, answer.json()["code"]) == (status, code), (method, path)
            assert status != 405 or method not in answer.headers["allow"]
        assert client.put("/v2/requests/x").headers["allow"] == "GET, HEAD, DELETE"
        assert client.head("/v2/requests/x/status").status_code == 404


def test_models_say_whose_weights_they_are(server: Server) -> None:
    models = {m["slug"]: m for m in httpx.get(f"{server.url}/v1/models").json()["models"]}
    assert models[SLUG]["checkpoint"] == "micro" and models[SLUG]["stand_in"]
    assert [p["name"] for p in models[SLUG]["parameters"]] == [k.name for k in KNOBS]


# -- wrong input ------------------------------------------------------------------------------

BODIES: list[tuple[bytes, str]] = [
    *(
        (json.dumps({"prompt": "x", f: v}).encode(), "bad_parameter")
        for f, v in WRONG
        if f != "prompt" and not isinstance(v, type)
        if (f, v) != ("num_inference_steps", 19)  # servers in tests take it
    ),
    (b"{}", "bad_parameter"),
    (b'{"prompt": "\\ud800"}', "bad_parameter"),
    (b'{"prompt": "a\\u0000b"}', "bad_parameter"),
    (b'{"prompt": "x", "seed": ' + b"9" * 400 + b"}", "bad_parameter"),
    (b'{"prompt": "x", "guidance_scale": 1e999}', "bad_parameter"),
    (b'{"prompt": "x", "guidance_scale": -Infinity}', "bad_parameter"),
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "bad_parameter"),
    (b'{"prompt": "x", "prompt": "y"}', "bad_parameter"),
    (b'{"prompt": "x", "samples": 1, "samples": 4}', "bad_parameter"),
    (b'{"prompt": "x", "width": 512, "width": 768}', "bad_parameter"),
    (b'{"prompt": "x", "width": 5, "\\ud800": 1}', "bad_parameter"),
    (b"", "malformed_body"),
    (b"{", "malformed_body"),
    (b"[]", "malformed_body"),
    (b"null", "malformed_body"),
    (b'"x"', "malformed_body"),
    (b"\xff\xfe", "malformed_body"),
    (b"\x00", "malformed_body"),
    (b"prompt=x", "malformed_body"),
    (b"[" * 100_000, "malformed_body"),
    (b'{"a":' * 50_000, "malformed_body"),
]


def test_every_wrong_body_is_named_and_free(server: Server) -> None:
    before = credits(server)
    with server.client() as client:
        for body, code in BODIES:
            for version in ("v1", "v2"):
                answer = client.post(
                    f"/{version}/{SLUG}", content=body, headers={"content-type": "application/json"}
                )
                assert answer.status_code == 400, (body[:80], answer.text)
                assert answer.json()["code"] == code, body[:80]
                assert set(answer.json()) == {"error", "code"}
    assert credits(server) == before


def test_ten_megabytes_are_refused(server: Server) -> None:
    with server.client() as client:
        for body in (b'{"prompt": "' + b"x" * 10_000_000 + b'"}', b"x" * 10_000_000):
            answer = client.post(
                f"/v2/{SLUG}", content=body, headers={"content-type": "application/json"}
            )
            assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def test_large_headers_are_refused(server: Server) -> None:
    with server.client() as client:
        answer = client.get("/v1/models", headers={"x-large": "x" * 70_000})
        assert (answer.status_code, answer.json()["code"]) == (431, "headers_too_large")


def test_a_body_that_breaks_off_is_no_request(server: Server) -> None:
    before = credits(server)
    head = (
        f"POST /v2/{SLUG} HTTP/1.1\r\nhost: x\r\nx-api-key: {server.key}\r\n"
        "content-type: application/json\r\ncontent-length: 1000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + json.dumps(QUICK).encode())
    time.sleep(0.5)  # time enough for a job that should not be
    assert credits(server) == before


def test_foreign_field_names_can_be_sent_back(server: Server) -> None:
    body = json.dumps({**QUICK, "\ud800": 1})  # ASCII escapes; no client library would send it
    with server.client() as client:
        answer = client.post(
            f"/v2/{SLUG}", content=body.encode(), headers={"content-type": "application/json"}
        )
        assert answer.json()["warnings"] == ["unknown field ignored: ?"]
        client.delete(f"/v2/requests/{answer.json()['request_id']}")


def test_content_type(server: Server) -> None:
    with server.client() as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""):
            answer = client.post(
                f"/v1/{SLUG}", content=b'{"prompt": "x"}', headers={"content-type": kind}
            )
            assert (answer.status_code, answer.json()["code"]) == (406, "wrong_content_type")
        accepted = client.post(
            f"/v2/{SLUG}",
            content=json.dumps(QUICK).encode(),
            headers={"content-type": "Application/JSON; charset=utf-8"},
        )
        assert accepted.status_code == 200
        client.delete(f"/v2/requests/{accepted.json()['request_id']}")


def test_odd_paths_and_queries_never_break_it(server: Server) -> None:
    with server.client() as client:
        for path in (
            "/v2/requests/%00/status",
            "/v2/requests/%ff%fe",
            "/v1/%2e%2e/x",
            "/v2/requests/" + "x" * 5000,
            "/v2/requests/a/status?wait=nan",
            "/v2/requests/a/status?wait=%00",
            "/v2/requests/a/status?preview=%00",
            "/v2/requests/a/events?wait=nan",
            "/files/x?exp=%ff&sig=%ff",
        ):
            assert 400 <= client.get(path).status_code < 500, path


# -- command line on a running server -----------------------------------------------------------


def test_command_line_sees_the_same_store(server: Server, completed: dict[str, Any]) -> None:
    data = ("--data", str(server.data))
    listed = imaged("jobs", "list", "--limit", "200", *data).stdout
    assert completed["id"] in listed and "12/12" in listed
    shown = cli("jobs", "show", completed["id"], *data).stdout
    assert "COMPLETED" in shown and SLUG in shown
    assert "had already ended" in cli("jobs", "cancel", completed["id"], *data).stdout
    missing = cli("jobs", "show", "nope", *data)
    assert missing.exit_code == 1 and missing.stderr.startswith("Error: there is no job nope")
    listed = cli("keys", "list", *data).stdout
    assert "first" in listed and server.key not in listed
    made = cli("keys", "create", "--name", "cli", *data).stdout.strip()
    assert made.startswith("SG_") and len(made) == 35
    key_id = cli("keys", "list", *data).stdout.strip().splitlines()[-1].split()[0]
    assert "has 15.0" in cli("keys", "top-up", key_id, "5", *data).stdout
    assert "revoked" in cli("keys", "revoke", key_id, *data).stdout
    with server.client(made) as client:
        assert client.get("/v1/get-user-credits").status_code == 401
    assert "micro" in cli("models", "list", *data).stdout
    assert "micro stands in" in cli("models", "show", SLUG, *data).stdout


def test_importing_the_gateway_does_not_import_torch() -> None:
    code = "import sys, imaged.gateway.app, imaged.client.client; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
