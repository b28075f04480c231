"""What a replay says of two receipts, on a gateway whose worker paints at once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from imaged.provenance import receipts
from imaged.store.accounts import keys
from imaged.store.jobs import queue
from tests.contract.gate import Gate
from tests.mutants import red

JSON = {"content-type": "application/json"}
NAMES = ("checkpoint_sha256", "table_sha256", "loras", "engine", "dtype", "determinism")


def receipt_of(gate: Gate, **params: Any) -> dict[str, Any]:
    job_id = gate.submit("a house", seed=1, **params)
    gate.wait_for_end(job_id)
    with gate.client() as client:
        return dict(client.get(f"/v2/requests/{job_id}").json()["images"][0]["receipt"])


def replayed(gate: Gate, before: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The answer to a receipt that says something else, signed by the gateway's own key."""
    facts = {n: v for n, v in {**before, **changes}.items() if n in receipts.FACTS}
    receipt = receipts.sign(facts, keys.load_signer(gate.settings.data))
    with gate.client() as client:
        answer = client.post("/v2/replay", json={"receipt": receipt})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def shown(gate: Gate) -> None:
    receipt = receipt_of(gate)
    for name in NAMES:
        answer = replayed(gate, receipt, **{name: "another"})
        [found] = answer["differences"]
        assert found == {"field": name, "receipt": "another", "now": receipt[name]}
        assert answer["verdict"] == "identical" and answer["signed_here"] is True


def test_what_made_it_is_compared(gate: Gate) -> None:
    shown(gate)


@pytest.mark.parametrize("name", NAMES)
def test_a_mutant_that_ignores_a_cause_is_seen(gate: Gate, name: str) -> None:
    others = tuple(c for c in receipts.CAUSES if c != name)
    with red(receipts, "CAUSES", others, raises=ValueError):
        shown(gate)


def test_only_our_own_receipts_say_in_which_types(gate: Gate) -> None:
    """Whoever signs their own could have this server load a checkpoint in any of them."""
    receipt = receipt_of(gate)
    theirs = receipts.sign({n: receipt[n] for n in receipts.FACTS}, Ed25519PrivateKey.generate())
    said = []
    for sent in (receipt, theirs):
        with gate.client() as client:
            answer = client.post("/v2/replay", json={"receipt": sent}).json()
        assert answer["signed_here"] is (sent is receipt)
        with gate.database.read() as c:
            said.append(queue.read(c, [answer["request_id"]])[answer["request_id"]].made_in)
    assert said == [receipts.made_in(receipt), None]


@pytest.mark.parametrize(
    "changes",
    [
        {"picture": {"height": 512, "sha256": "0" * 64}},
        {"picture": {"width": "512", "height": 512, "sha256": "0" * 64}},
        {"device": "CPU \ud800"},
        {"request": {"prompt": "x", "\udfff": 1}},
    ],
    ids=str,
)
def test_what_could_not_be_answered_is_no_receipt(gate: Gate, changes: dict[str, Any]) -> None:
    """Whoever signs it: nothing is made, and nothing charged."""
    facts = {n: v for n, v in {**receipt_of(gate), **changes}.items() if n in receipts.FACTS}
    theirs = receipts.sign(facts, Ed25519PrivateKey.generate())
    with gate.client() as client:
        before = client.get("/v1/credits").json()
        answer = client.post("/v2/replay", content=json.dumps({"receipt": theirs}), headers=JSON)
        assert answer.status_code == 400 and answer.json()["code"] == "bad_parameter", answer.text
        assert client.get("/v1/credits").json() == before


def test_a_repeated_replay_needs_no_file(gate: Gate) -> None:
    receipt = receipt_of(gate)
    with gate.client() as client:
        under = {"idempotency-key": "once-more"}
        sent: dict[str, Any] = {"json": {"receipt": receipt}, "headers": under}
        first = client.post("/v2/replay", **sent)
        for path in (gate.settings.data / "files").rglob(f"{first.json()['request_id']}*"):
            path.unlink()
        repeat = client.post("/v2/replay", **sent)
    assert repeat.status_code == 200 and repeat.headers["idempotent-replayed"] == "true"
    assert repeat.json()["receipt"] == first.json()["receipt"]


def test_another_picture_is_another(gate: Gate) -> None:
    receipt = receipt_of(gate)
    other = {**receipt["picture"], "sha256": "0" * 64}
    answer = replayed(gate, receipt, picture=other)
    assert answer["verdict"] == "different" and answer["differences"] == []
    assert answer["picture"] == {"receipt": other, "now": receipt["picture"]}


def test_a_replay_is_a_job_like_any_other(gate: Gate) -> None:
    receipt, key = receipt_of(gate), gate.make_key(credits=0.0)
    with gate.client(key) as client:
        answer = client.post("/v2/replay", json={"receipt": receipt})
        assert answer.json()["code"] == "no_credits"
    with gate.client(gate.make_key(models=["micro"])) as client:
        assert client.post("/v2/replay", json={"receipt": receipt}).status_code == 403
    with gate.client() as client:
        header = {"Idempotency-Key": "again"}
        twice = [
            client.post("/v2/replay", json={"receipt": receipt}, headers=header) for _ in range(2)
        ]
    assert len({answer.json()["request_id"] for answer in twice}) == 1
    assert twice[1].headers["idempotent-replayed"] == "true"
