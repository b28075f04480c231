"""Drafts as the API has them: what rests, what goes on, and what it costs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import httpx
import pytest

from imaged.gateway.operations import maintenance
from imaged.jobs import Draft, Job
from imaged.params.image_params import ImageParams
from imaged.store.accounts import ledger
from imaged.store.jobs import drafts, queue
from imaged.store.sql.schema import jobs
from tests.contract.gate import Gate
from tests.mutants import red

PRICE = 0.008 * 0.25 * 25 / 25  # of one picture of 512 px at 25 calls
BODY_PARAMS = ImageParams("a house", samples=4, seed=7, img_width=512, img_height=512)
BODY = {"prompt": "a house", "width": 512, "height": 512, "samples": 4, "seed": 7}


def post(gate: Gate, path: str, body: Any, key: str | None = None) -> httpx.Response:
    with gate.client(key) as client:
        return client.post(path, json=body)


def submit(gate: Gate, draft: Any, key: str | None = None, **more: Any) -> str:
    answer = post(gate, f"/v2/{gate.slug}", {**BODY, **more, "draft": draft}, key)
    assert answer.status_code == 200 and "warnings" not in answer.json(), answer.text
    return str(answer.json()["request_id"])


def parked(gate: Gate, key: str | None = None, **more: Any) -> str:
    job_id = submit(gate, {"steps": 8}, key, **more)
    with gate.client(key) as client:
        told = client.get(f"/v2/requests/{job_id}/status?wait=20").json()
    assert told["progress"]["parked"] is True
    return job_id


def finish(gate: Gate, job_id: str, body: Any, key: str | None = None) -> httpx.Response:
    return post(gate, f"/v2/requests/{job_id}/finish", body, key)


def credits(gate: Gate, key: str) -> float:
    with gate.client(key) as client:
        return float(client.get("/v1/get-user-credits").json()["credits"])


def books(gate: Gate) -> list[str]:
    with gate.database.read() as c:
        return ledger.audit(c)


def test_a_draft_rests_and_can_be_looked_at(gate: Gate) -> None:
    job_id = submit(gate, {"steps": 8})
    body = gate.wait_for_end(job_id).json()
    assert body["status"] == "PROCESSING"  # the original knows no other word
    assert (body["step"], body["steps"]) == (8, 25)
    assert (body["unet_calls_done"], body["unet_calls"]) == (32, 32)
    assert body["finish_url"] == f"{gate.url}/v2/requests/{job_id}/finish"
    assert [image["seed"] for image in body["images"]] == [7, 8, 9, 10]
    assert all(httpx.get(image["url"]).status_code == 200 for image in body["images"])
    with gate.client() as client:
        assert client.get(f"/v2/requests/{job_id}").json() == body
        assert client.get(f"/v1/requests/{job_id}").json() == body


@pytest.mark.parametrize("samples", [[2, 0], [0, 1, 2, 3], None])
def test_the_chosen_go_on_for_the_price_of_their_calls(
    gate: Gate, samples: list[int] | None
) -> None:
    key = gate.make_key(credits=1.0)
    job_id = submit(gate, {"steps": 8}, key)
    with gate.client(key) as client:
        client.get(f"/v2/requests/{job_id}/status?wait=20")
        assert credits(gate, key) == pytest.approx(1 - 4 * PRICE)  # held
        answer = finish(gate, job_id, {} if samples is None else {"samples": samples}, key)
        assert answer.status_code == 200 and "progress" not in answer.json()
        done = client.get(f"/v2/requests/{job_id}/status?wait=20").json()
        images = client.get(f"/v2/requests/{job_id}").json()["images"]
    chosen = sorted(samples or range(4))
    calls = 4 * 8 + len(chosen) * 17
    assert done["status"] == "COMPLETED"
    assert [image["seed"] for image in images] == [7 + k for k in chosen]
    assert done["metrics"]["cost"] == pytest.approx(4 * PRICE * calls / 100, abs=2e-6)
    assert credits(gate, key) == pytest.approx(1 - done["metrics"]["cost"])
    assert done["metrics"]["remaining_credits"] == credits(gate, key)
    assert books(gate) == []


def test_who_does_not_want_it_pays_for_the_draft(gate: Gate) -> None:
    key = gate.make_key(credits=1.0)
    job_id = submit(gate, {"fraction": 0.2}, key)
    with gate.client(key) as client:
        client.get(f"/v2/requests/{job_id}/status?wait=20")
        body = client.delete(f"/v2/requests/{job_id}").json()
        assert (body["status"], body["code"]) == ("FAILED", "cancelled")
        assert body["metrics"]["cost"] == pytest.approx(4 * PRICE * 20 / 100)
        assert finish(gate, job_id, {}, key).status_code == 409
    assert credits(gate, key) == pytest.approx(1 - body["metrics"]["cost"])
    assert books(gate) == []


def test_an_unfinished_draft_ends_with_its_record(gate: Gate) -> None:
    key = gate.make_key(credits=1.0)
    job_id = submit(gate, {"steps": 5}, key)
    with gate.client(key) as client:
        client.get(f"/v2/requests/{job_id}/status?wait=20")
        gate.expire_everything()
        body = client.get(f"/v2/requests/{job_id}/status").json()
        assert (body["status"], body["code"]) == ("FAILED", "draft_expired")
        gate.expire_everything()
        assert client.get(f"/v2/requests/{job_id}/status").status_code == 404
    assert credits(gate, key) == pytest.approx(1 - 4 * PRICE * 20 / 100)
    assert not list((gate.settings.data / "files").glob(f"*/{job_id}*"))
    assert books(gate) == []


def test_who_cancels_before_there_is_anything_to_look_at_pays_nothing(gate: Gate) -> None:
    key = gate.make_key(credits=1.0)
    job_id = submit(gate, {"steps": 8}, key, prompt="run")
    with gate.client(key) as client:
        assert "cost" not in client.delete(f"/v2/requests/{job_id}").json()["metrics"]
    assert credits(gate, key) == 1.0


def test_prompt_and_guidance_may_change(gate: Gate) -> None:
    job_id = parked(gate)
    assert finish(
        gate, job_id, {"samples": [1], "prompt": "a boat", "guidance_scale": 3}
    ).is_success
    with gate.client() as client:
        client.get(f"/v2/requests/{job_id}/status?wait=20")
        assert client.get(f"/v2/requests/{job_id}").json()["prompt"] == "a boat"


@pytest.mark.parametrize(
    "draft",
    [
        *(0, 8, "8", [], {}, {"steps": 5, "fraction": 0.5}),
        *({"steps": steps} for steps in (0, 25, 8.5, True, "many")),
        *({"fraction": fraction} for fraction in (0, 1.0, -0.5, "x")),
    ],
    ids=str,
)
def test_other_drafts_are_refused(gate: Gate, draft: Any) -> None:
    for path in (f"/v2/{gate.slug}", f"/v2/{gate.slug}/preflight"):
        answer = post(gate, path, {**BODY, "draft": draft})
        assert answer.status_code == 400
        assert answer.json()["error"].startswith("draft should be")
        assert "between 1 and 24" in answer.json()["error"]


def test_v1_waits_for_finished_pictures(gate: Gate) -> None:
    answer = post(gate, f"/v1/{gate.slug}", {**BODY, "draft": {"steps": 8}})
    assert answer.status_code == 400 and answer.json()["error"].startswith("draft is for")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        *(({"samples": s}, "samples") for s in ([], [4], [-1], [0, 0], "0", 1, [0.5], [True])),
        ({"seed": 3}, "seed"),
        ({"guidance_scale": 900}, "guidance_scale"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "naked child"}, "prompt"),
    ],
    ids=str,
)
def test_what_cannot_be_finished_is_refused_and_rests(gate: Gate, body: Any, field: str) -> None:
    job_id = parked(gate)
    answer = finish(gate, job_id, body)
    assert answer.status_code == 400 and answer.json()["error"].startswith(field), answer.text
    assert gate.wait_for_end(job_id).json()["progress"]["parked"] is True


def test_only_what_rests_can_be_finished_and_once(gate: Gate) -> None:
    whole = gate.submit("run")
    assert finish(gate, whole, {}).json()["code"] == "not_parked"
    job_id = parked(gate)
    assert finish(gate, job_id, {"samples": [0]}).status_code == 200
    assert finish(gate, job_id, {"samples": [1]}).status_code == 409
    assert finish(gate, parked(gate), {}, gate.make_key()).status_code == 404


def test_a_repeat_names_the_same_draft(gate: Gate) -> None:
    header = {"Idempotency-Key": "a-draft"}
    with gate.client() as client:
        asked = [
            client.post(f"/v2/{gate.slug}", json={**BODY, **draft}, headers=header)
            for draft in (
                {"draft": {"steps": 8}},
                {"draft": {"steps": 8}},
                {},
                {"draft": {"steps": 9}},
            )
        ]
    assert asked[0].json()["request_id"] == asked[1].json()["request_id"]
    assert [answer.status_code for answer in asked] == [200, 200, 409, 409]


def test_preflight_tells_its_price(gate: Gate) -> None:
    told = post(gate, f"/v2/{gate.slug}/preflight", {**BODY, "draft": {"steps": 8}}).json()
    assert told["draft"] == {
        "steps": 8,
        "unet_calls": 32,
        "cost": pytest.approx(told["cost"] * 0.32),
    }
    quoted = {"quote_id": told["quote_id"], "draft": {"steps": 8}}
    job_id = post(gate, f"/v2/{gate.slug}", quoted).json()["request_id"]
    assert gate.wait_for_end(job_id).json()["progress"]["parked"] is True


def test_a_finished_draft_is_a_job_like_others(gate: Gate) -> None:
    """It has not been there when a worker died: it keeps nobody from being taken beside it."""
    job_id = parked(gate)
    with gate.database.write() as c:
        assert drafts.resume(c, queue.read(c, [job_id])[job_id], [0], BODY_PARAMS, time.time())
        queue.register(c, "another", 1, "here", time.time())
        [job] = queue.claim(c, "another", [gate.slug], 1, time.time(), alone=False)
        assert (job.id, job.attempts) == (job_id, 1)
        assert job.calls_done == 0  # what there was to tell of was of other pictures
        queue.end_lease(c, "another", time.time(), 60.0, blame=False)


def test_what_is_finished_keeps_its_loras(gate: Gate) -> None:
    job_id = parked(gate)
    answer = finish(gate, job_id, {"prompt": "x <lora:none:1>"})
    assert answer.status_code == 400
    assert answer.json()["error"] == "prompt should name the LoRAs that the draft was made with"


@pytest.mark.parametrize(
    ("reason", "prompt", "charged"),
    [
        ("prompt_too_long", "another", True),
        ("prompt_too_long", "a house", False),
        ("unknown_lora", "another", False),
        ("engine_error", "another", False),
    ],
)
def test_who_makes_it_fail_pays_for_the_draft(
    gate: Gate, reason: str, prompt: str, charged: bool
) -> None:
    key = gate.make_key(credits=1.0)
    job_id = parked(gate, key)
    with gate.database.write() as c:
        params = replace(BODY_PARAMS, prompt=prompt)
        drafts.resume(c, queue.read(c, [job_id])[job_id], [0], params, time.time())
        queue.register(c, "another", 1, "here", time.time())
        [job] = queue.claim(c, "another", [gate.slug], 1, time.time())
        assert queue.fail(c, job, "another", reason, "text", time.time(), 60.0)
        queue.end_lease(c, "another", time.time(), 60.0, blame=False)
    assert (1 - credits(gate, key) > 1e-3) == charged
    assert ("cost" in gate.wait_for_end(job_id, key).json()["metrics"]) == charged
    assert books(gate) == []


def test_history_tells_what_was_charged(gate: Gate) -> None:
    key = gate.make_key(credits=1.0)
    shown, hidden = parked(gate, key), submit(gate, {"steps": 8}, key, prompt="run")
    with gate.client(key) as client:
        for job_id in (shown, hidden):
            client.delete(f"/v2/requests/{job_id}")

        def told() -> list[float]:
            rows = client.get("/inference-request/request-history").json()["data"]
            return [
                r["credits_deduction"]
                for j in (shown, hidden)
                for r in rows
                if r["request_id"] == j
            ]

        live = told()
        gate.expire_everything()
        assert told() == live == [pytest.approx(1 - credits(gate, key)), 0.0]


def test_a_draft_is_there_until_it_has_been_ended(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "_chores_once", lambda _: None)  # which would end it
    job_id = parked(gate)
    with gate.database.write() as c:
        c.execute(jobs.update().where(jobs.c.id == job_id).values(expires_at=1.0))
    assert gate.wait_for_end(job_id).status_code == 200
    assert finish(gate, job_id, {}).status_code == 200


def test_a_mutant_that_charges_the_whole_price_is_seen(gate: Gate) -> None:
    with red(Job, "owed_micros", property(lambda job: job.cost_micros)):
        test_the_chosen_go_on_for_the_price_of_their_calls(gate, [0, 2])


def test_a_mutant_that_forgets_what_a_draft_costs_is_seen(gate: Gate) -> None:
    def forgetful(draft: Draft, **_: Any) -> Draft:
        return Draft(draft.steps, 32)

    with red(drafts, "replace", forgetful, raises=KeyError, match="cost"):
        test_who_does_not_want_it_pays_for_the_draft(gate)
