"""Contract 8: what the vendor's SDK asks at its fixed hosts, kept at home by a few lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from segmind import SegmindClient, SegmindError

from imaged.gateway.compat.segmind import LIST_KEY
from imaged.params.knobs import KNOBS
from tests.contract.gate import Gate


def stay_home(client: SegmindClient) -> SegmindClient:
    """What the README says: every request of this client goes to its base URL's server."""
    home = httpx.URL(client.base_url)

    def redirect(request: httpx.Request) -> None:
        request.url = request.url.copy_with(scheme=home.scheme, netloc=home.netloc)
        request.headers["host"] = home.netloc.decode()

    client._client.event_hooks = {"request": [redirect]}
    return client


@pytest.fixture
def own(gate: Gate) -> Iterator[SegmindClient]:
    """The vendor's SDK with a key of its own, and three requests made."""
    client = stay_home(SegmindClient(api_key=gate.make_key(), base_url=f"{gate.url}/v1"))
    with gate.client(client.api_key) as http:
        http.post(f"/v1/{gate.slug}", json={"prompt": "first", "samples": 2})
        http.post("/v1/micro", json={"prompt": "fail: no luck"})
        http.post(f"/v2/{gate.slug}", json={"prompt": "run"})
    yield client
    client._client.close()


def test_without_those_lines_it_would_leave(gate: Gate) -> None:
    """Why the README warns: the request is built for the vendor's host, with our key in it."""
    client = SegmindClient(api_key="SG_ours", base_url=f"{gate.url}/v1")
    caught: list[httpx.Request] = []

    def stop(request: httpx.Request) -> None:
        caught.append(request)
        raise httpx.ConnectError("not sent")

    client._client.event_hooks = {"request": [stop]}
    for call in (client.models.list, client.accounts.current, client.generations.history):
        with pytest.raises(httpx.ConnectError):
            call()
    client._client.close()
    assert {urlsplit(str(r.url)).netloc.rpartition(".")[0] for r in caught} == {
        "api.spotprod.segmind",
        "cloud.segmind",
    }
    assert all(r.headers["x-api-key"] == "SG_ours" for r in caught)


def test_models(own: SegmindClient, gate: Gate) -> None:
    models = {m["slug"]: m for m in own.models.list()[LIST_KEY]}
    assert set(models) == {gate.slug, "micro"}
    model = models[gate.slug]
    assert model["is_visible"] and not model["is_depreciated"] and model["title"]
    assert set(model["parameters"]) == {k.name for k in KNOBS}
    steps = model["parameters"]["num_inference_steps"]
    assert (steps["min"], steps["max"], steps["default"]) == (20, 100, 25)
    assert steps["affectsPricing"] and not steps["isRequired"]
    assert len(model["parameters"]["scheduler"]["options"]) == 13


def test_generations(own: SegmindClient, gate: Gate) -> None:
    rows = own.generations.list()["data"]
    assert [row["prompt"] for row in rows] == ["first", "first"]
    assert {row["request_id"] for row in rows} == {rows[0]["request_id"]}
    assert httpx.get(rows[1]["generation_url"]).status_code == 200
    assert rows[0]["credits_deduction"] == rows[1]["credits_deduction"] > 0
    assert rows[0]["latency_ms"] > 0 and rows[0]["parameters"]["samples"] == 2
    assert own.generations.list(model_name="micro")["data"] == []
    today = datetime.now(UTC).date()
    assert len(own.generations.list(start_date=str(today), end_date=str(today))["data"]) == 2
    assert own.generations.list(end_date=str(today - timedelta(days=1)))["data"] == []
    assert own.generations.list(user_id=rows[0]["user_id"])["data"] == rows
    assert own.generations.recent(gate.slug)["data"] == rows


def test_history(own: SegmindClient, gate: Gate) -> None:
    found = own.generations.history()
    assert [row["model_status"] for row in found["data"]] == ["PENDING", "FAILED"] + [
        "COMPLETED"
    ] * 2
    assert (found["page"], found["total"]) == (1, 3)
    failed = own.generations.history(status="FAILED")["data"]
    assert [(row["error"], row["credits_deduction"]) for row in failed] == [("no luck", 0.0)]
    assert len(own.generations.history(model_name="yamers")["data"]) == 3
    assert own.generations.history(model_name="%")["data"] == []
    oldest = own.generations.history(sort_order="asc", per_page=1)["data"]
    assert [row["request_body"]["prompt"] for row in oldest] == ["first"] * 2
    second = own.generations.history(sort_order="asc", per_page=1, page=2)["data"]
    assert [row["model_status"] for row in second] == ["FAILED"]
    for order in ("model_name", "credits_deduction"):
        assert len(own.generations.history(sort_by=order)["data"]) == 4
    assert own.generations.get(failed[0]["request_id"]) == failed[0]


@pytest.mark.parametrize("day", ["1969-12-31", "1969-06-01", "0001-01-02"])
def test_a_search_ends_where_it_says(own: SegmindClient, day: str) -> None:
    """The first of these days ends at second 0 of all clocks."""
    assert own.generations.history(to_date=day)["data"] == []
    assert own.generations.list(end_date=day)["data"] == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"status": "DONE"}, "status"),
        ({"sort_by": "id"}, "sort_by"),
        ({"sort_order": "up"}, "sort_order"),
        ({"from_date": "yesterday"}, "from_date"),
        ({"from_date": "2020-01-01"}, "from_date"),
        ({"to_date": "9999-12-31"}, "to_date"),
        ({"page": 0}, "page"),
        ({"per_page": 101}, "per_page"),
        ({"user_id": "5e3"}, "user_id"),
        ({"user_email": "a@b.example"}, "user_email"),
    ],
)
def test_odd_searches(gate: Gate, query: dict[str, Any], field: str) -> None:
    with gate.client() as client:
        answer = client.get("/inference-request/request-history", params=query)
    assert answer.status_code == 400 and answer.json()["error"].startswith(field)


def test_recent_needs_a_model(gate: Gate) -> None:
    with gate.client() as client:
        assert client.get("/inference-request/recent-generations").status_code == 400


def test_others_requests_are_not_there(own: SegmindClient, gate: Gate) -> None:
    [request_id] = {row["request_id"] for row in own.generations.list()["data"]}
    stranger = stay_home(SegmindClient(api_key=gate.make_key(), base_url=f"{gate.url}/v1"))
    assert stranger.generations.list()["data"] == stranger.generations.history()["data"] == []
    for asked in (request_id, "../generations", "%"):
        with pytest.raises(SegmindError) as caught:
            stranger.generations.get(asked)
        assert caught.value.status == 404
    stranger._client.close()


def test_the_account(own: SegmindClient) -> None:
    account = own.accounts.current()
    assert account["credits"] > 0 and account["user_id"].isdigit()
    assert account["user_id"] == own.generations.list()["data"][0]["user_id"]


def test_history_is_dropped_in_time(tmp_path: Any) -> None:
    for kept_s, there in ((3600.0, True), (0.0, False)):
        data = tmp_path / str(there)
        data.mkdir()
        with Gate(data, history_s=kept_s).running() as own:
            job_id = own.submit()
            own.wait_for_end(job_id)
            own.expire_everything()
            with own.client() as client:
                answer = client.get(f"/inference-request/request-history/{job_id}")
            assert (answer.status_code == 200) is there
            time.sleep(0.01)
