"""What the vendor's SDK does of itself, and what a server must therefore do and leave."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import segmind
from segmind import InferenceTimeout, SegmindClient, SegmindError
from segmind.webhooks import Webhooks

from imaged.catalogue import toml
from imaged.catalogue.model import DEFAULT_SLUG
from imaged.gateway.compat.segmind import LIST_KEY
from imaged.gateway.present.bodies import WIRE
from imaged.jobs import State, price_micros
from imaged.params.image_params import ImageParams
from tests.contract.gate import Gate
from tests.contract.test_hosts import stay_home
from tests.contract.test_v2 import ask, wait_for

SUBMITTED = {"request_id": "x", "status_url": "http://h/status", "response_url": "http://h/result"}


@pytest.fixture
def sdk(gate: Gate) -> Iterator[SegmindClient]:
    client = SegmindClient(api_key=gate.key, base_url=f"{gate.url}/v1")
    yield client
    client._client.close()


def against(answer: Callable[[httpx.Request], httpx.Response], base_url: str) -> SegmindClient:
    """The SDK before a server that answers so; nothing is sent anywhere."""
    client = SegmindClient(api_key="SG_x", base_url=base_url)
    client._client.close()
    client._client = httpx.Client(base_url=base_url, transport=httpx.MockTransport(answer))
    return client


# -- where it asks ----------------------------------------------------------------------------


def asked(base_url: str) -> list[str]:
    """Where a blocking call and a submit go."""
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(200, json=SUBMITTED)

    client = against(answer, base_url)
    client.run_sync("slug")
    client.submit_async("slug")
    return seen


@pytest.mark.parametrize(
    ("base_url", "sync", "submit"),
    [
        ("http://h:8000/v1", "http://h:8000/v1/slug", "http://h:8000/v2/slug"),
        ("http://h:8000", "http://h:8000/slug", "http://h:8000/v2/slug"),
        ("http://vm:8000", "http://vm:8000/slug", "http://v2/slug"),
        ("https://h/vision", "https://h/vision/slug", "https://h/v2/slug"),
        ("http://vm:8000/v1", "http://vm:8000/v1/slug", "http://vm:8000/v2/slug"),
        ("https://h/vision/v1", "https://h/vision/v1/slug", "https://h/vision/v2/slug"),
    ],
)
def test_only_a_base_url_that_ends_in_v1_leads_everywhere(
    base_url: str, sync: str, submit: str
) -> None:
    assert asked(base_url) == [sync, submit]


def test_the_modules_functions_follow_its_default_client(
    sdk: SegmindClient, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until another one is set, it is made for the vendor's host."""
    monkeypatch.setattr(segmind, "_default_client", None)
    made = segmind._get_client()
    assert made.base_url == "https://api.segmind.com/v1"
    made._client.close()
    monkeypatch.setattr(segmind, "_default_client", stay_home(sdk))
    request_id = segmind.run(gate.slug, prompt="x")["request_id"]
    assert segmind.run_sync(gate.slug, prompt="x").status_code == 200
    assert segmind.submit_async(gate.slug, prompt="x").request_id
    assert segmind.models.list()[LIST_KEY] and "webhooks" in segmind.webhooks.get()
    assert segmind.generations.get(request_id)["model_status"] == "COMPLETED"
    for chat in (segmind.chat, segmind.chat_sync, segmind.submit_chat):
        with pytest.raises(SegmindError) as caught:
            chat("gpt", prompt="x")
        assert caught.value.status == 404


def test_the_module_has_neither_accounts_nor_finetune() -> None:
    groups = {"files", "pixelflows", "webhooks", "models", "generations"}
    calls = {"run", "run_sync", "submit_async", "chat", "chat_sync", "submit_chat"}
    assert groups | calls <= set(segmind.__all__)
    for name in ("accounts", "finetune"):
        assert hasattr(SegmindClient, name) and name not in segmind.__all__


def test_an_attribute_leads_some_calls_home_and_the_others_have_none(
    sdk: SegmindClient, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts: list[str] = []

    def no_further(request: httpx.Request) -> None:
        hosts.append(request.url.host)
        if request.url.host != "127.0.0.1":
            raise httpx.ConnectError("not sent")

    sdk._client.event_hooks = {"request": [no_further]}
    monkeypatch.setattr(Webhooks, "base_url", f"{gate.url}/webhook")
    home = f"{gate.url}/inference-request/request-history"
    shadowed = sys.modules["segmind.generations"]  # by the package's group of that name
    monkeypatch.setattr(shadowed, "REQUEST_HISTORY_URL", home)
    assert "webhooks" in sdk.webhooks.get() and "data" in sdk.generations.history()
    for literal in (sdk.models.list, sdk.generations.list, sdk.accounts.current):
        with pytest.raises(httpx.ConnectError):
            literal()
    assert hosts[:2] == ["127.0.0.1"] * 2 and all("segmind.com" in host for host in hosts[2:])


# -- what it takes for an end ------------------------------------------------------------------


def polled(
    statuses: list[httpx.Response], result: httpx.Response, timeout_s: float = 60
) -> dict[str, Any]:
    """What a wait gives before a server that answers so, one after another."""
    left = iter(statuses)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(200, json=SUBMITTED)
        return next(left) if request.url.path == "/status" else result

    job = against(answer, "http://h/v1").submit_async("slug")
    return dict(job.wait(timeout=timeout_s, interval=0.01))


def test_what_it_cannot_read_is_no_end_to_it() -> None:
    """Nor is an array a result; every answer here is an object, or an error."""
    odd = [
        httpx.Response(307, headers={"location": "/elsewhere"}),
        httpx.Response(200, json=["COMPLETED"]),
        httpx.Response(200, text="<html>"),
        httpx.Response(503, json={"status": "COMPLETED"}),
    ]
    assert polled(odd, httpx.Response(200, json=[1])) == {}


def test_every_answer_about_a_job_is_one_object(gate: Gate) -> None:
    for prompt, state in (("hold", "QUEUED"), ("run", "PROCESSING"), ("x", "COMPLETED")):
        job_id = gate.submit(prompt)
        wait_for(gate, job_id, state)
        for answer in ask(gate, job_id).values():
            assert isinstance(answer.json(), dict) and not answer.is_redirect
        with gate.client() as client:
            client.delete(f"/v2/requests/{job_id}")


def test_a_lower_case_state_is_no_end_to_it() -> None:
    with pytest.raises(InferenceTimeout):
        polled([httpx.Response(200, json={"status": "completed"})] * 9, httpx.Response(200), 0.05)


def test_the_states_are_four_in_upper_case(gate: Gate) -> None:
    """A job that was cancelled too shows as one of them, and one that is parked."""
    seen: set[str] = set()
    ways = (("hold", "QUEUED"), ("run", "PROCESSING"), ("x", "COMPLETED"), ("fail: no", "FAILED"))
    for prompt, state in ways:
        job_id = gate.submit(prompt)
        wait_for(gate, job_id, state)
        seen |= {answer.json()["status"] for answer in ask(gate, job_id).values()}
        with gate.client() as client:
            seen.add(client.delete(f"/v2/requests/{job_id}").json()["status"])
            seen.add(client.get(f"/v2/requests/{job_id}/status").json()["status"])
    assert (
        seen
        == {"QUEUED", "PROCESSING", "COMPLETED", "FAILED"}
        == {WIRE.get(state, state) for state in State}
    )


def test_a_result_that_is_gone_is_an_error_to_it(sdk: SegmindClient, gate: Gate) -> None:
    job = sdk.submit_async(gate.slug, prompt="x")
    gate.wait_for_end(job.request_id)
    job.response_url = job.response_url.replace(job.request_id, "0" * 32)
    with pytest.raises(SegmindError) as caught:
        job.wait(interval=0.02)
    assert (caught.value.status, caught.value.detail) == (404, f"Request {'0' * 32} not found")


def test_run_has_no_deadline_of_its_own_to_set(sdk: SegmindClient, gate: Gate) -> None:
    """Its words go into the body; `submit_async(...).wait(...)` is the way."""
    assert sdk.run(gate.slug, prompt="x", timeout=0, interval=0)["status"] == "COMPLETED"
    job = sdk.submit_async(gate.slug, prompt="hold", timeout=600)
    assert job.submit_response["warnings"] == ["unknown field ignored: timeout"]
    with pytest.raises(InferenceTimeout):
        job.wait(timeout=0.01, interval=0.01)


# -- what it lists -----------------------------------------------------------------------------


def test_what_is_said_to_affect_the_price_does(sdk: SegmindClient, gate: Gate) -> None:
    models = {m["slug"]: m for m in stay_home(sdk).models.list()[LIST_KEY]}
    said = {n: knob["affectsPricing"] for n, knob in models[gate.slug]["parameters"].items()}
    other: dict[str, Any] = {
        "samples": 2,
        "num_inference_steps": 30,
        "img_width": 512,
        "img_height": 512,
        "prompt": "a house",
        "negative_prompt": "trees",
        "guidance_scale": 3.0,
        "seed": 5,
        "scheduler": "Heun",
        "base64": True,
        "output_format": "png",
        "prompt_report": True,
        "loras": [{"name": "x"}],
        "prompt_dialect": "plain",
        "emphasis": "original",
        "scheduler_profile": "a1111",
        "clip_skip": 1,
        "guidance_rescale": 0.5,
        "guidance_start": 0.1,
        "guidance_end": 0.9,
        "original_size": (512, 512),
        "crop": (1, 2),
        "target_size": (512, 512),
    }
    model = toml.built_in()[DEFAULT_SLUG]
    usual = price_micros(model, ImageParams("x"))
    found = {
        name: price_micros(model, ImageParams(**{"prompt": "x", name: value})) != usual
        for name, value in other.items()
    }
    assert said == found
