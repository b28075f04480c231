"""The OpenAPI document says what is served, and nothing it allows breaks the server."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance

from imaged.gateway.app import ROUTES
from imaged.gateway.openapi import STATUS, document
from imaged.params import KNOBS, read_params
from tests.conftest import SLUG
from tests.contract.gate import Gate

DOCUMENT = document(ROUTES)
OPERATIONS = [(verb, path) for path, found in DOCUMENT["paths"].items() for verb in found]
EXAMPLES = 40  # for each operation


def test_it_is_served_and_whole(gate: Gate) -> None:
    assert httpx.get(f"{gate.url}/openapi.json").json() == DOCUMENT
    assert {path for _, path in OPERATIONS} == {route.path for route in ROUTES} | {STATUS}
    page = httpx.get(f"{gate.url}/docs").text
    assert all(path in page for _, path in OPERATIONS) and "http" not in page


def test_it_is_made_once(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anyone may ask for it, as often as they like."""
    monkeypatch.delattr("imaged.gateway.openapi.document")
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


@pytest.mark.parametrize(("verb", "path"), OPERATIONS)
def test_whatever_it_allows_is_answered(schema: Any, poor: str, verb: str, path: str) -> None:
    operation = schema[path][verb.upper()]
    seen: list[int] = []

    @settings(
        max_examples=EXAMPLES,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        if "slug" in case.path_parameters and len(seen) % 3:
            case.path_parameters["slug"] = SLUG  # else it would hardly ever be one that is served
        answer = case.call(headers={"x-api-key": poor})
        case.validate_response(answer, checks=[not_a_server_error, content_type_conformance])
        seen.append(answer.status_code)

    ask()
    assert seen and max(seen) < 500
