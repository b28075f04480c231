"""One table of outcomes, met by the vendor's SDK, curl, the npm client and the MCP server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from segmind import InferenceFailed, SegmindClient, SegmindError

from tests.contract import outcomes
from tests.contract.curl import Answer, curl
from tests.contract.gate import Gate
from tests.contract.outcomes import MADE, OUTCOMES, Outcome, Seen
from tests.contract.test_node import ENVIRON, installed

JPEG = b"\xff\xd8\xff"
EVERY = {200, 400, 401, 403, 404, 405, 406, 410, 422, 429, 500, 502, 504}


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    """A server whose blocking calls end at once."""
    data = tmp_path_factory.mktemp("hasty") / "data"
    data.mkdir()
    with Gate(data, wait_s=0.2).running() as running:
        yield running


@pytest.fixture
def places(gate: Gate, hasty: Gate) -> Iterator[Mapping[bool, Gate]]:
    """The server for each outcome, by whether it is hasty, while some slugs break it."""
    with outcomes.faults():
        yield {False: gate, True: hasty}


def met(client: str) -> list[tuple[Outcome, str]]:
    return [(outcome, version) for outcome in OUTCOMES for version in outcome.of(client)]


def test_no_outcome_is_left_out() -> None:
    assert {outcome.status for outcome in OUTCOMES} == EVERY
    for client in outcomes.CLIENTS:
        left = EVERY - {outcome.status for outcome, _ in met(client)}
        assert left <= ({405} if client == "npm" else set())  # which cannot say GET


# -- the vendor's SDK -------------------------------------------------------------------------


def by_sdk(gate: Gate, key: str, outcome: Outcome, version: str) -> Seen:
    client = SegmindClient(api_key=key or None, base_url=f"{gate.url}/v1")
    try:
        if outcome.verb == "GET":
            client._request("GET", f"{gate.url}/{version}/{outcome.slug}")
        elif version == "v1":
            answer = client.run_sync(outcome.slug, **outcome.body)
            return Seen(answer.status_code, MADE if answer.content.startswith(JPEG) else "")
        else:
            result = client.submit_async(outcome.slug, **outcome.body).wait(interval=0.02)
            return Seen(200, MADE if result["output"] else "")
    except InferenceFailed as failed:
        return Seen(422, failed.detail, failed.status_body["code"])
    except SegmindError as refused:
        return Seen(refused.status or 0, refused.detail or "")
    finally:
        client._client.close()
    return Seen(200, "")


def test_the_vendors_sdk(places: Mapping[bool, Gate], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEGMIND_API_KEY", raising=False)
    given = outcomes.keys(places[False])
    seen = {
        (outcome.name, version): by_sdk(
            places[outcome.hasty], key_of(outcome, places, given), outcome, version
        )
        for outcome, version in met("sdk")
    }
    assert outcomes.differing("sdk", seen) == []


def key_of(outcome: Outcome, places: Mapping[bool, Gate], given: Mapping[str, str]) -> str:
    return places[True].key if outcome.hasty else given[outcome.key]


# -- curl -------------------------------------------------------------------------------------


def by_curl(folder: Path, gate: Gate, key: str, outcome: Outcome, version: str) -> Seen:
    with_key = ("-H", f"x-api-key: {key}") if key else ()
    body = ("-H", "content-type: application/json", "-d", json.dumps(outcome.body))
    sent = outcome.curl or (body if outcome.verb == "POST" else ())
    answer = curl(folder, f"{gate.url}/{version}/{outcome.slug}", *with_key, *sent)
    if answer.status == 200 and version == "v2":
        curl(folder, f"{answer.body['status_url']}?wait=20", *with_key)
        answer = curl(folder, answer.body["response_url"], *with_key)
    return told(answer)


def told(answer: Answer) -> Seen:
    if answer.content.startswith(JPEG) or (answer.status == 200 and answer.body["output"]):
        return Seen(answer.status, MADE)
    return Seen(answer.status, answer.body["error"], answer.body["code"])


def test_curl(places: Mapping[bool, Gate], tmp_path: Path) -> None:
    given = outcomes.keys(places[False])
    seen = {
        (outcome.name, version): by_curl(
            tmp_path, places[outcome.hasty], key_of(outcome, places, given), outcome, version
        )
        for outcome, version in met("curl")
    }
    assert outcomes.differing("curl", seen) == []


# -- the npm client and the MCP server --------------------------------------------------------


def by_node(places: Mapping[bool, Gate]) -> dict[str, dict[tuple[str, str], Seen]]:
    """What both saw, by client; from one run of node."""
    folder, given = installed(), outcomes.keys(places[False])
    asked = [
        {
            "client": client,
            "name": outcome.name,
            "verb": outcome.verb,
            "slug": outcome.slug,
            "origin": places[outcome.hasty].url,
            "key": key_of(outcome, places, given),
            "body": outcome.body,
        }
        for client in ("npm", "mcp")
        for outcome, _ in met(client)
    ]
    done = subprocess.run(
        ["node", "outcomes.mjs"],
        cwd=folder,
        env=ENVIRON,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, dict[tuple[str, str], Seen]] = {"npm": {}, "mcp": {}}
    for row in json.loads(done.stdout):
        found = Seen(row["status"], row["text"] or "", row.get("code"))
        seen[row["client"]][row["name"], "v1"] = found
    return seen


def test_the_npm_client_and_the_mcp_server(places: Mapping[bool, Gate]) -> None:
    for client, seen in by_node(places).items():
        assert outcomes.differing(client, seen) == []


def test_a_wrong_answer_is_seen() -> None:
    right = {
        (outcome.name, version): Seen(outcome.status, outcome.words, outcome.code)
        for outcome, version in met("sdk")
    }
    assert outcomes.differing("sdk", right) == []
    for wrong in ({"status": 404}, {"text": "no"}, {"code": "other"}, {"text": "credits, secret"}):
        changed = {**right, ("poor", "v1"): replace(right["poor", "v1"], **wrong)}
        assert len(outcomes.differing("sdk", changed)) == 1
