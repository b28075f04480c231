"""The OpenAPI document says what is served, and nothing it allows breaks the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
)
from starlette.requests import Request

from imaged.gateway.app import ROUTES
from imaged.gateway.auth import public, route
from imaged.gateway.openapi.document import STATUS, document
from imaged.gateway.openapi.examples import EXAMPLES
from imaged.gateway.present.answer import Answer, Body
from imaged.params.image_params import read_params
from imaged.params.knobs import KNOBS
from tests.conftest import SLUG
from tests.contract.gate import Gate
from tests.contract.test_drafts import parked

DOCUMENT = document(ROUTES)
OPERATIONS = [(verb, path) for path, found in DOCUMENT["paths"].items() for verb in found]
ASKED = [4, pytest.param(18, marks=pytest.mark.slow)]  # times, of each operation
PAID = 10  # that may make pictures
NOWHERE = "http://localhost/"  # a name that may stand in a webhook, and is then not sent to
UNSHAPED = ("/docs", "/files/{name}", "/v2/requests/{job_id}/events")  # no JSON
FINISH = "/v2/requests/{job_id}/finish"
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]


def test_it_is_served_and_whole(gate: Gate) -> None:
    assert httpx.get(f"{gate.url}/openapi.json").json() == DOCUMENT
    assert {path for _, path in OPERATIONS} == {route.path for route in ROUTES} | {STATUS}
    page = httpx.get(f"{gate.url}/docs").text
    assert all(path in page for _, path in OPERATIONS) and "http" not in page


def test_it_is_made_once(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anyone may ask for it, as often as they like."""
    monkeypatch.delattr("imaged.gateway.openapi.document.document")
    for path in ("/openapi.json", "/docs"):
        assert httpx.get(f"{gate.url}{path}").status_code == 200


def test_every_knob_is_in_it_and_its_bounds_are_the_servers() -> None:
    shown = DOCUMENT["components"]["schemas"]["Picture"]
    assert set(shown["properties"]) == {k.name for k in KNOBS}
    assert shown["required"] == ["prompt"]
    for knob in KNOBS:
        schema = shown["properties"][knob.name]
        for bound in ("minimum", "maximum"):
            if bound in schema:
                read_params({"prompt": "x", knob.name: schema[bound]})


def test_examples_of_requests_are_taken(gate: Gate) -> None:
    """Each is what its schema allows, and where it asks for pictures they are made."""
    shown = {path: body for path, body in bodies("requestBody") if "example" in body}
    assert set(shown) == set(EXAMPLES)
    for body in shown.values():
        validator(body["schema"]).validate(body["example"])
    with gate.client() as client:
        job_id = parked(gate)
        for path, example in EXAMPLES.items():
            if not path.startswith("/webhook/"):  # theirs has an address beyond this machine
                asked = path.format(slug=SLUG, job_id=job_id)
                answer = client.post(asked, json=example)
                assert answer.status_code == 200, (path, answer.text)


def test_errors_are_of_the_dialect_and_their_examples_are_what_is_answered(gate: Gate) -> None:
    shown = {}
    for path, body in bodies("responses"):
        for code, example in body.get("examples", {}).items():
            validator(body["schema"]).validate(example["value"])
            shown[path, code] = example["value"]
    assert len(shown) > 200
    for path, headers in (
        ("/v2/{slug}", {}),
        ("/openai/v1/images/generations", {"authorization": "Bearer wrong"}),
        ("/sdapi/v1/txt2img", {"x-api-key": "wrong"}),
    ):
        answer = httpx.post(gate.url + path.format(slug=SLUG), json={}, headers=headers)
        code = "key_invalid" if headers else "key_missing"
        assert answer.status_code == 401 and answer.json() == shown[path, code]
    for code in ("still_running", "model_retired"):
        assert "message" in shown["/openai/v1/images/generations", code]["error"]
        assert "detail" in shown["/sdapi/v1/txt2img", code]
        assert set(shown["/v1/{slug}", code]) == {"error", "code"}
    poor = gate.make_key(credits=0.0)
    with gate.client(poor) as client:
        answer = client.post("/openai/v1/images/generations", json={"prompt": "x"})
    example = shown["/openai/v1/images/generations", "no_credits"]
    assert answer.status_code == 429
    assert {**answer.json()["error"], "message": ""} == {**example["error"], "message": ""}


def test_every_answer_is_said_by_its_handler() -> None:
    """An answer without a structure would be in the document as anything."""
    for verb, path in OPERATIONS:
        if path in UNSHAPED or path in ("/metrics", "/openapi.json"):
            continue
        content = DOCUMENT["paths"][path][verb]["responses"]["200"]["content"]
        assert content["application/json"]["schema"], (verb, path)


class Picture(Body):
    """As the parameters of a request are called."""

    sha256: str


@public
async def lookalike(_: Request) -> Answer[Picture]:
    """GET /lookalike: an answer with a name that is taken."""
    raise NotImplementedError


def test_two_bodies_of_one_name_are_refused() -> None:
    """One would be described as the other."""
    with pytest.raises(TypeError, match="two bodies have one name: Picture"):
        document([*ROUTES, route("/lookalike", lookalike)])


def bodies(part: str) -> Iterator[tuple[str, Any]]:
    """The JSON bodies of requests or of answers, by path."""
    for path, operations in DOCUMENT["paths"].items():
        for operation in operations.values():
            found = operation.get(part, {})
            for one in found.values() if part == "responses" else [found]:
                if body := one.get("content", {}).get("application/json"):
                    yield path, body


def validator(schema: Any) -> Any:
    return jsonschema_rs.validator_for({**schema, "components": DOCUMENT["components"]})


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [op["operationId"] for found in DOCUMENT["paths"].values() for op in found.values()]
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def poor(gate: Gate) -> str:
    """A key without credits: whatever is asked, no picture is made."""
    return gate.make_key(credits=0.0, rpm=1_000_000)


@pytest.fixture(scope="module")
def schema(gate: Gate) -> Any:
    return schemathesis.openapi.from_url(f"{gate.url}/openapi.json")


@pytest.mark.parametrize("examples", ASKED)
@pytest.mark.parametrize(("verb", "path"), OPERATIONS)
def test_whatever_it_allows_is_answered(
    schema: Any, poor: str, verb: str, path: str, examples: int
) -> None:
    operation = schema[path][verb.upper()]
    seen: list[int] = []

    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        if "slug" in case.path_parameters and len(seen) % 3:
            case.path_parameters["slug"] = SLUG  # else it would hardly ever be one that is served
        answer = case.call(headers={"x-api-key": poor})
        case.validate_response(answer, checks=CHECKS)
        seen.append(answer.status_code)

    ask()
    assert seen and max(seen) < 500


# -- what is answered to a key that can pay ---------------------------------------------------


@pytest.fixture(scope="module")
def rich(gate: Gate) -> str:
    return gate.make_key(credits=1000.0, rpm=1_000_000)


@pytest.fixture(scope="module")
def there(gate: Gate, rich: str) -> dict[str, list[Any]]:
    """Things of this key that requests may name: jobs in several states, a webhook."""
    with gate.client(rich) as client:
        hook = {"webhook_url": NOWHERE, "event": {"types": ["GENERATION"]}}
        webhook_id = client.post("/webhook/add", json=hook).json()["webhook_id"]
        jobs = [
            client.post(f"/v2/{SLUG}", json={"prompt": prompt, **more}).json()["request_id"]
            for prompt, more in (
                *(("x", {"samples": 2}), ("x", {"base64": True}), ("fail: no luck", {})),
                *(("hold", {}), ("run", {})),
            )
        ]
        told = client.post(f"/v2/{SLUG}/preflight", json={"prompt": "x", "base64": True})
        quote = told.json()["quote_id"]
        for job_id in jobs[:3]:
            client.get(f"/v2/requests/{job_id}/status?wait=20")
        made = client.get(f"/v2/requests/{jobs[0]}").json()["images"]
    return {
        **dict.fromkeys(("job_id", "request_id"), jobs),
        **{name: [SLUG] for name in ("slug", "model_name")},
        "webhook_id": [webhook_id],
        "webhook_url": [NOWHERE],
        "base64": [True],
        "quote_id": [quote],
        "receipt": [image["receipt"] for image in made],
    }


@pytest.mark.parametrize(("verb", "path"), [o for o in OPERATIONS if o[1] not in UNSHAPED])
def test_what_it_says_is_answered(
    gate: Gate, schema: Any, rich: str, there: dict[str, list[Any]], verb: str, path: str
) -> None:
    """With names that are there in the place of any, so that the answers are whole ones."""
    operation, worked = schema[path][verb.upper()], list[bool]()
    if path == FINISH:
        there = {**there, "job_id": [parked(gate, key=rich)], "samples": [[0]]}

    @settings(
        max_examples=PAID,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        body = case.body if isinstance(case.body, dict) else {}
        for place in (case.path_parameters, case.query, body):
            for name in set(place or ()) & set(there):
                place[name] = there[name][len(worked) % len(there[name])]
        answer = case.call(headers={"x-api-key": rich})
        case.validate_response(answer, checks=CHECKS)
        worked.append(answer.status_code == 200)

    ask()
    assert any(worked)
