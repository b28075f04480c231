"""Content rules over HTTP: refused prompts on every route, and the header that says so."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import httpx

from tests.conftest import QUICK, SLUG, Server, cli, imaged

SAFETY = "prompt-rules=hard"
HARD = {**QUICK, "prompt": "naked child"}


def test_a_refused_prompt_fails_as_the_original_fails(server: Server) -> None:
    with server.client() as client:
        before = client.get("/v1/get-user-credits").json()
        submitted = client.post(f"/v2/{SLUG}", json=HARD)
        assert (submitted.status_code, submitted.json()["status"]) == (200, "QUEUED")
        job_id = submitted.json()["request_id"]
        answers = [
            client.get(f"/v2/requests/{job_id}/status"),
            client.get(f"/v2/requests/{job_id}"),
            client.post(f"/v1/{SLUG}", json=HARD),
        ]
        for answer in answers:
            assert answer.status_code == 422
            body = answer.json()
            assert (body["status"], body["code"]) == ("FAILED", "content_policy")
            assert "content policy" in body["error"]
            assert "cost" not in body["metrics"] and "naked" not in answer.text
        assert client.get("/v1/get-user-credits").json() == before
        avoided = client.post(f"/v2/{SLUG}", json={**QUICK, "negative_prompt": "naked child"})
        cancelled = client.delete(f"/v2/requests/{avoided.json()['request_id']}").json()
        assert cancelled["code"] == "cancelled"  # it waited or ran until now


def test_every_answer_says_which_checks_ran(server: Server) -> None:
    with server.client() as client:
        made = client.post(f"/v1/{SLUG}", json=QUICK)
        answers = [
            made,
            httpx.get(made.headers["x-output-urls"].split()[0]),
            client.get(f"/v2/requests/{made.headers['x-request-id']}/status"),
            client.get(f"/v2/requests/{made.headers['x-request-id']}"),
            client.post(f"/v2/{SLUG}", json={}),
            client.post(f"/v2/{SLUG}", content=b"x" * 300_000),
            client.get("/nowhere"),
            client.put("/livez"),
            client.get("/readyz"),
            httpx.get(f"{server.url}/v1/get-user-credits"),
        ]
    assert {a.status_code for a in answers} >= {200, 400, 401, 404, 405, 413}
    rules = [a.headers["x-safety"].split(", ")[0] for a in answers]
    assert rules == [SAFETY] * len(answers)
    assert made.headers["x-safety"] == f"{SAFETY}, image-checker=off"
    with socket.create_connection(("127.0.0.1", server.port), 10) as raw:
        raw.sendall(b"this is not HTTP\r\n\r\n")
        assert SAFETY.encode() in raw.recv(4096)


def test_a_mistake_in_the_rules_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "rules.txt").write_text("# fine\n/(/\n")
    environ = {**os.environ, "IMAGED_RULES": str(tmp_path / "rules.txt")}
    done = imaged("serve", "--data", str(tmp_path / "data"), env=environ)
    assert done.returncode == 1
    assert "rules.txt:2: this is no regular expression" in done.stderr


def test_the_command_line_knows_the_hard_class_too() -> None:
    done = cli("generate", "naked child", "--steps", "20")
    assert done.exit_code == 1
    assert "content policy" in done.stderr and "denoising" not in done.stderr
