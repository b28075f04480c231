"""Preflight says what a submit then does, costs nothing, and its quote is kept."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from imaged.gateway.read.forecast import WIDE
from imaged.gateway.submit import cpu_share, quotes
from imaged.jobs import Submission, price_micros
from imaged.sampling.schedulers import SCHEDULERS
from imaged.store import catalogue
from imaged.store.accounts import ledger
from imaged.store.sql.schema import jobs
from tests.conftest import until
from tests.contract.gate import Gate
from tests.mutants import red

BODY: dict[str, Any] = {
    "prompt": "a red house",
    "width": 512,
    "img_height": 768,
    "steps": "30",
    "samples": 2,
}


def look(gate: Gate, key: str | None = None, slug: str = "", **body: Any) -> httpx.Response:
    with gate.client(key) as client:
        return client.post(f"/v2/{slug or gate.slug}/preflight", json={**BODY, **body})


def submit(gate: Gate, key: str | None = None, slug: str = "", **body: Any) -> httpx.Response:
    with gate.client(key) as client:
        return client.post(f"/v2/{slug or gate.slug}", json=body)


def job(gate: Gate, job_id: str) -> Any:
    with gate.database.read() as c:
        return c.execute(sa.select(jobs).where(jobs.c.id == job_id)).one()


def count(gate: Gate) -> int:
    with gate.database.read() as c:
        return int(c.execute(sa.select(sa.func.count()).select_from(jobs)).scalar_one())


def test_it_says_what_a_submit_does(gate: Gate) -> None:
    before = count(gate)
    told = look(gate, scheduler="k_heun", seed=7).json()
    assert count(gate) == before
    answer = submit(gate, **BODY, scheduler="k_heun", seed=7)
    made = job(gate, answer.json()["request_id"])
    assert told["cost"] * 1e6 == made.cost_micros
    assert told["unet_calls"] == 2 * (2 * 30 - 1)
    assert {k: v for k, v in told["parameters"].items() if v not in (None, [])} == {
        k: v for k, v in made.params.items() if v not in (None, [])
    }
    assert told["checkpoint"] == "micro" and told["determinism"] == "exact"
    assert told["scheduler"]["name"] == "Heun" and len(told["scheduler"]["sigmas"]) == 31
    assert [t["field"] for t in told["taken"]] == ["scheduler", "steps", "width"]
    assert answer.json()["warnings"] == ["scheduler was read as Heun"]


def test_when_it_would_be_done(gate: Gate) -> None:
    for seed in range(3):
        gate.wait_for_end(gate.submit(seed=seed))
    expected = look(gate).json()["expected"]
    assert expected["jobs"] >= 3
    for seconds in (expected["wait_s"], expected["run_s"]):
        assert 0 <= seconds["low"] <= seconds["expected"] <= seconds["high"]
    assert expected["run_s"]["high"] >= expected["run_s"]["expected"] * min(WIDE[1], 1)


def test_a_quote_is_all_that_need_be_sent(gate: Gate) -> None:
    told = look(gate, seed=7, prompt="a café, 🏔️").json()
    for body in (dict[str, Any](), BODY | {"prompt": "a café, 🏔️"}):
        made = job(gate, submit(gate, quote_id=told["quote_id"], **body).json()["request_id"])
        assert made.params["prompt"] == "a café, 🏔️" and made.params["seed"] == 7
        assert (made.params["img_height"], made.cost_micros) == (768, told["cost"] * 1e6)
    with gate.client() as client:
        answer = client.post(f"/v1/{gate.slug}", json={"quote_id": told["quote_id"]})
    assert answer.headers["content-type"] == "image/jpeg"
    assert float(answer.headers["x-cost"]) == told["cost"]


@pytest.fixture
def dear(gate: Gate) -> Any:
    """A model whose price was raised after the quote was given."""
    with gate.database.write() as c:
        catalogue.add(c, "priced", {"price": 0.01}, time.time())
    until(lambda: look(gate, slug="priced").is_success)  # the catalogue has been read again
    told = look(gate, slug="priced").json()
    with gate.database.write() as c:
        catalogue.add(c, "priced", {"price": 0.05}, time.time())
    until(lambda: look(gate, slug="priced").json()["cost"] != told["cost"])
    yield told
    with gate.database.write() as c:
        catalogue.remove(c, "priced")


def test_a_quote_is_kept_when_the_price_has_risen(gate: Gate, dear: dict[str, Any]) -> None:
    now = look(gate, slug="priced").json()
    assert now["cost"] == pytest.approx(5 * dear["cost"])

    def charged() -> float:
        answer = submit(gate, slug="priced", quote_id=dear["quote_id"])
        return float(job(gate, answer.json()["request_id"]).cost_micros / 1e6)

    assert charged() == dear["cost"]
    forgetful = property(lambda asked: price_micros(asked.model, asked.params))
    with red(Submission, "cost_micros", forgetful):
        assert charged() == dear["cost"]


def test_what_is_sent_beside_a_quote_and_unknown_is_told(gate: Gate) -> None:
    quote = look(gate).json()["quote_id"]
    assert "warnings" not in submit(gate, quote_id=quote).json()
    answer = submit(gate, quote_id=quote, draft={"steps": 8}, mood="sad")
    assert answer.json()["warnings"] == ["unknown field ignored: mood"]


def test_a_quote_is_for_its_key_its_model_and_its_parameters(gate: Gate) -> None:
    quote = look(gate).json()["quote_id"]
    other = gate.make_key()
    before = count(gate)
    unknown = "quote_id should be one that preflight gave for this model and key"
    for refused, why in (
        (submit(gate, other, quote_id=quote), unknown),
        (submit(gate, slug="micro", quote_id=quote), unknown),
        (submit(gate, quote_id=quote, steps=31), "steps should be as in the quote_id"),
        (submit(gate, quote_id=quote, prompt="a blue house"), "prompt should be as in"),
    ):
        assert refused.status_code == 400 and why in refused.json()["error"]
    assert count(gate) == before


def test_nobody_can_make_a_quote(gate: Gate) -> None:
    quote = look(gate).json()["quote_id"]
    raw = base64.urlsafe_b64decode(quote + "=" * (-len(quote) % 4))
    changed = [bytes([*raw[:n], raw[n] ^ 1, *raw[n + 1 :]]) for n in (0, 15, 16, len(raw) - 1)]
    forged = [base64.urlsafe_b64encode(c).decode() for c in (*changed, raw[:16], raw[16:], b"")]
    for text in (*forged, quote[:-4], "", "x", 5, [], {}, "é", "=" * 9, "A" * 199_000, True):
        answer = submit(gate, quote_id=text)
        assert answer.status_code == 400 and answer.json()["code"] == "bad_parameter", text


def test_a_quote_ends(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a repeat of what was made with it still finds that."""
    key = gate.make_key()
    quote = {"quote_id": look(gate, key).json()["quote_id"]}
    late = {"Idempotency-Key": "late"}
    with gate.client(key) as client:
        first = client.post(f"/v2/{gate.slug}", json=quote, headers=late).json()["request_id"]
        monkeypatch.setattr(time, "time", lambda at=time.time: at() + quotes.LIFE_S + 1)
        again = client.post(f"/v2/{gate.slug}", json=quote, headers=late)
    assert again.json()["request_id"] == first
    answer = submit(gate, key, **quote)
    assert answer.status_code == 400 and "at most 600 seconds old" in answer.json()["error"]


def test_nobody_asks_all_the_time(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who had much worked out waits before the next; others do not."""
    key, other = gate.make_key(), gate.make_key()
    monkeypatch.setattr(cpu_share, "AT_ONCE_S", 0.0)
    monkeypatch.setattr(cpu_share, "SHARE", 0.001)
    assert look(gate, key).status_code == 200
    refused = look(gate, key)
    assert (refused.status_code, refused.json()["code"]) == (429, "too_fast")
    assert int(refused.headers["retry-after"]) >= 1
    assert look(gate, other).status_code == 200


def test_what_is_echoed_can_be_sent(gate: Gate) -> None:
    content = json.dumps({"prompt": "x", "original_size": "1024x1024" + " " * 91 + "\ud800"})
    with gate.client() as client:
        client.headers["content-type"] = "application/json"
        answer = client.post(f"/v2/{gate.slug}/preflight", content=content)
    assert answer.status_code == 400 and "original_size" in answer.json()["error"]


def test_a_quote_repeats_under_an_idempotency_key(gate: Gate) -> None:
    quote = {"quote_id": look(gate).json()["quote_id"]}
    with gate.client() as client:
        first, again = (
            client.post(f"/v2/{gate.slug}", json=quote, headers={"Idempotency-Key": "quoted"})
            for _ in range(2)
        )
    assert first.json()["request_id"] == again.json()["request_id"]
    assert again.headers["idempotent-replayed"] == "true"


def test_what_would_be_refused_is_refused(gate: Gate) -> None:
    for body, field in (
        ({"scheduler": "Eulr"}, "scheduler"),
        ({"width": 511}, "width"),
        ({"loras": ["nowhere"]}, "loras"),
        ({"prompt": "".join(f"[a:b:{n}]" for n in range(1, 40)), "steps": 50}, "prompt"),
    ):
        answer = look(gate, **body)
        assert answer.status_code == 400 and answer.json()["error"].startswith(field), body
    assert look(gate, "SG_0").status_code == 401
    assert look(gate, slug="no-such-model").status_code == 404
    limited = gate.make_key(models=["micro"])
    assert look(gate, limited).status_code == 403


def test_it_warns(gate: Gate) -> None:
    poor = gate.make_key(credits=0.001)
    told = look(
        gate, poor, scheduler="DPM Multi", negative_prompt="bad_hands5", foo=1, guidance_scale=1
    ).json()
    for part in (
        "unknown field ignored: foo",
        "the checkpoint is UNLOADED",
        "the key has 0.001000 credits left",
        "DPM Multi is known to leave artefacts",
        "negative_prompt does nothing at guidance_scale 1",
        "negative_prompt has words that look like textual inversions and are none: bad_hands5",
    ):
        assert any(part in warning for warning in told["warnings"]), part


def test_a_prompt_that_the_rules_refuse_is_told_of(gate: Gate) -> None:
    told = look(gate, prompt="naked child").json()
    assert "prompt would be refused by the rules of this server" in told["warnings"]


def test_it_costs_nothing(gate: Gate) -> None:
    key = gate.make_key(credits=1.0, rpm=1)
    for _ in range(3):
        assert look(gate, key).status_code == 200
    with gate.client(key) as client:
        assert client.get("/v1/get-user-credits").json()["credits"] == 1.0
    with gate.database.read() as c:
        assert ledger.audit(c) == []


def test_schedulers(gate: Gate) -> None:
    answer = httpx.get(f"{gate.url}/v1/schedulers", params={"steps": 30})
    found = answer.json()["schedulers"]
    assert [s["name"] for s in found] == list(SCHEDULERS)
    assert all(len(s["timesteps"]) == 30 and s["sigmas"][-1] == 0 for s in found)
    for query, why in (
        ({"steps": 3}, "between 4 and 150"),
        ({"steps": "x"}, "between 4 and 150"),
        ({"profile": "kohya"}, "diffusers, a1111"),
    ):
        refused = httpx.get(f"{gate.url}/v1/schedulers", params=query)
        assert refused.status_code == 400 and why in refused.json()["error"]
    assert httpx.get(f"{gate.url}/v1/schedulers", params={"model": "?"}).status_code == 404
