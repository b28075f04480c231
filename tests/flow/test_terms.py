"""Idempotency-Key and Cancel-After over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.conftest import QUICK, SLUG, Server, cli, until


def new_key(server: Server) -> str:
    """A key of its own, so that its money tells what these calls cost."""
    made = cli("keys", "create", "--credits", "1", "--data", str(server.data))
    return made.stdout.strip()


def spent_or_held(client: httpx.Client) -> float:
    return round(1.0 - float(client.get("/v1/get-user-credits").json()["credits"]), 6)


def test_eight_at_once_are_one_job_and_one_charge(server: Server) -> None:
    body, headers = {**QUICK, "prompt": "a red house, dawn"}, {"idempotency-key": "first"}
    with server.client(new_key(server)) as client, ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda _: client.post(f"/v2/{SLUG}", json=body, headers=headers), range(8))
        )
        assert [a.status_code for a in answers] == [200] * 8
        assert len({a.text for a in answers}) == 1
        replayed = [a.headers.get("idempotent-replayed") for a in answers]
        assert sorted(map(str, replayed)) == ["None", *["true"] * 7]
        # The same over v1: it waits for the first job and gives its picture.
        first = client.post(f"/v1/{SLUG}", json=body, headers=headers)
        again = client.post(f"/v1/{SLUG}", json=body, headers=headers)
        assert first.status_code == again.status_code == 200
        assert first.content == again.content
        assert first.headers["x-request-id"] == answers[0].json()["request_id"]
        assert again.headers["idempotent-replayed"] == "true"
        assert spent_or_held(client) == float(first.headers["x-cost"])
        other = client.post(f"/v2/{SLUG}", json={**body, "seed": 3}, headers=headers)
        assert (other.status_code, other.json()["code"]) == (409, "idempotency_mismatch")
        wrong = client.post(f"/v2/{SLUG}", json=body, headers={"idempotency-key": ""})
        assert wrong.status_code == 400 and wrong.json()["error"].startswith("Idempotency-Key")


def test_a_job_that_would_wait_too_long_fails_and_costs_nothing(server: Server) -> None:
    with server.client(new_key(server)) as client:
        before = [server.submit(num_inference_steps=100, samples=4) for _ in range(5)]
        url = f"/v2/{SLUG}"
        answer = client.post(url, json=QUICK, headers={"cancel-after": "0.000001"})
        status = server_status(client, answer.json()["request_id"])
        assert (status.status_code, status.json()["code"]) == (422, "queue_timeout")
        assert spent_or_held(client) == 0
        wrong = client.post(url, json=QUICK, headers={"cancel-after": "-1"})
        assert wrong.status_code == 400 and wrong.json()["error"].startswith("Cancel-After")
    with server.client() as client:
        for job_id in before:
            client.delete(f"/v2/requests/{job_id}")


def server_status(client: httpx.Client, job_id: str) -> httpx.Response:
    """The status once the job has ended."""

    def ended() -> httpx.Response | None:
        answer = client.get(f"/v2/requests/{job_id}/status", params={"wait": 30})
        return answer if answer.json()["status"] in ("COMPLETED", "FAILED") else None

    return until(ended, 60, say=lambda: "the job did not end")
