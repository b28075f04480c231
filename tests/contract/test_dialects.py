"""Other APIs on the same jobs, by their own clients: openai and webuiapi."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import webuiapi
from PIL import Image

from imaged.gateway.compat.a1111 import OFFERED, SAMPLERS
from imaged.sampling.schedulers import SCHEDULERS
from imaged.store.jobs import history
from tests.contract.gate import Gate
from tests.unit.test_infotext import read_back


@pytest.fixture
def client(gate: Gate) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=gate.key, base_url=f"{gate.url}/openai/v1", max_retries=0) as made:
        yield made


@pytest.fixture
def webui(gate: Gate) -> Iterator[Any]:
    api = webuiapi.WebUIApi(port=gate.settings.port, username="anyone", password=gate.key)
    yield api
    api.session.close()


def picture(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


# -- OpenAI -----------------------------------------------------------------------------------


def test_openai_links(client: openai.OpenAI, gate: Gate) -> None:
    made = client.images.generate(prompt="a house", n=2, size="512x768", quality="hd", user="me")
    assert made.data is not None and len(made.data) == 2 and made.created > 0
    for entry in made.data:
        assert picture(httpx.get(str(entry.url)).content).size == (512, 768)
    assert httpx.get(str(made.data[0].url)).headers["content-type"] == "image/png"


def test_openai_base64_and_our_parameters(client: openai.OpenAI, gate: Gate) -> None:
    ours = {"seed": 5, "num_inference_steps": 8, "negative_prompt": "trees", "scheduler": "Euler"}
    made = client.images.generate(
        prompt="a house",
        model=gate.slug,
        size="256x256",
        response_format="b64_json",
        output_format="jpeg",
        extra_body=ours,
    )
    assert made.data is not None
    image = picture(base64.b64decode(str(made.data[0].b64_json)))
    assert (image.format, image.size) == ("JPEG", (256, 256))
    assert made.model_dump()["seed"] == 5


def test_openai_lists_models(client: openai.OpenAI, gate: Gate) -> None:
    assert {model.id for model in client.models.list()} == {gate.slug, "micro"}
    assert client.models.retrieve("sdxl-lightning").id == "sdxl-lightning"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-image-1")
    assert caught.value.code == "model_not_found"
    limited = openai.OpenAI(
        api_key=gate.make_key(models=["micro"]), base_url=f"{gate.url}/openai/v1", max_retries=0
    )
    with limited, pytest.raises(openai.PermissionDeniedError):
        limited.images.generate(prompt="x", model=gate.slug)


@pytest.mark.parametrize(
    ("models", "listed"),
    [(["sdxl-lightning"], ["sdxl-lightning"]), (["micro", "none", "sdxl-old"], ["micro"])],
)
def test_the_dialects_list_what_this_key_may_ask_for(
    gate: Gate, models: list[str], listed: list[str]
) -> None:
    """A key may be for an alias alone, or name what is not served (any more)."""
    key, base_url = gate.make_key(models=models), f"{gate.url}/openai/v1"
    with openai.OpenAI(api_key=key, base_url=base_url, max_retries=0) as limited:
        assert [model.id for model in limited.models.list()] == listed
        assert [limited.models.retrieve(slug).id for slug in listed] == listed
    webui = webuiapi.WebUIApi(port=gate.settings.port, username="anyone", password=key)
    assert webui.util_get_model_names() == listed
    made = webui.txt2img(
        prompt="x", override_settings={"sd_model_checkpoint": listed[0]}, width=256, height=256
    )
    assert made.info["sd_model_name"]
    webui.session.close()


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"n": 5}, "n"),
        ({"size": "512x511"}, "size"),
        ({"size": "huge"}, "size"),
        ({"size": "99999x99999"}, "size"),
        ({"prompt": ""}, "prompt"),
        ({"background": "transparent"}, "background"),
        ({"output_format": "webp"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"response_format": "text"}, "response_format"),
        ({"quality": "best"}, "quality"),
        ({"extra_body": {"partial_images": 2}}, "partial_images"),
        ({"extra_body": {"stream": True}}, "stream"),
        ({"extra_body": {"model": 5}}, "model"),
        ({"extra_body": {"seed": "many"}}, "seed"),
    ],
)
def test_openai_refusals_name_their_own_field(
    client: openai.OpenAI, given: dict[str, Any], field: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "a house", **given})
    assert caught.value.param == field and caught.value.code == "bad_parameter"
    assert f" {field} " in str(caught.value)


def test_openai_errors(client: openai.OpenAI, gate: Gate) -> None:
    def asked(key: str, prompt: str = "x") -> Any:
        made = openai.OpenAI(api_key=key, base_url=f"{gate.url}/openai/v1", max_retries=0)
        with made, pytest.raises(openai.APIStatusError) as caught:
            made.images.generate(prompt=prompt)
        return caught.value

    assert isinstance(asked("SG_wrong"), openai.AuthenticationError)
    poor = asked(gate.make_key(credits=0))
    assert (poor.status_code, poor.code) == (429, "insufficient_quota")
    assert poor.response.headers["x-should-retry"] == "false"
    slow = gate.make_key(rpm=1)
    httpx.post(f"{gate.url}/v2/micro", json={"prompt": "x"}, headers={"x-api-key": slow})
    limited = asked(slow)
    assert (limited.status_code, limited.code) == (429, "too_fast")
    assert int(limited.response.headers["retry-after"]) > 0
    failed = asked(gate.key, "fail: content policy")
    assert isinstance(failed, openai.UnprocessableEntityError) and "content policy" in str(failed)
    assert failed.response.headers["x-rate-limit-limit"] == "100000"


class Lossy(httpx.HTTPTransport):
    """Delivers every request, and loses the first answer."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[httpx.Response] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.answers.append(super().handle_request(request))
        if len(self.answers) == 1:
            self.answers[0].read()
            raise httpx.ReadError("the connection broke")
        return self.answers[-1]


def test_openai_sends_again_and_is_charged_once(gate: Gate) -> None:
    key, lossy = gate.make_key(credits=1.0), Lossy()
    http: Any = httpx.Client(transport=lossy)  # their types name their own copy of httpx
    with openai.OpenAI(api_key=key, base_url=f"{gate.url}/openai/v1", http_client=http) as client:
        headers = {"Idempotency-Key": "one"}
        made = client.images.generate(prompt="a house", extra_headers=headers)
        first, second = lossy.answers
        assert second.headers["idempotent-replayed"] == "true"
        assert made.model_dump()["request_id"] == first.json()["request_id"]
        assert "idempotent-replayed" not in first.headers
        with pytest.raises(openai.ConflictError) as caught:
            client.images.generate(prompt="a boat", extra_headers=headers)
    assert caught.value.response.headers["x-should-retry"] == "false" and len(lossy.answers) == 3
    with gate.client(key) as ours:
        assert len(ours.get("/inference-request/request-history").json()["data"]) == 1


# -- A1111 ------------------------------------------------------------------------------------


def test_a1111_pictures(webui: Any, gate: Gate) -> None:
    made = webui.txt2img(
        prompt='a "house", b: c',
        negative_prompt="trees",
        seed=5,
        batch_size=2,
        cfg_scale=6.5,
        sampler_name="DPM++ 2M",
        scheduler="Karras",
        steps=12,
        width=512,
        height=256,
    )
    assert [image.size for image in made.images] == [(512, 256)] * 2
    found = read_back(made.image.info["parameters"])
    assert found["Prompt"] == 'a "house", b: c' and found["Negative"] == "trees"
    assert (found["Steps"], found["CFG scale"], found["Seed"]) == ("12", "6.5", "5")
    assert made.info["all_seeds"] == [5, 6] and made.info["sampler_name"] == "DPM++ 2M Karras"
    assert made.info["infotexts"][0] == made.image.info["parameters"]
    assert made.parameters["guidance_scale"] == 6.5


def test_a1111_on_the_same_terms(gate: Gate) -> None:
    url, key = f"{gate.url}/sdapi/v1/txt2img", gate.make_key()
    headers = {"x-api-key": key, "idempotency-key": "one"}
    first, second = (httpx.post(url, json={"prompt": "x"}, headers=headers) for _ in range(2))
    assert first.content == second.content and "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    other = httpx.post(url, json={"prompt": "y"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_mismatch")
    late = httpx.post(url, json={"prompt": "x"}, headers={"x-api-key": key, "cancel-after": "soon"})
    assert late.status_code == 400 and late.json()["detail"].startswith("Cancel-After ")


def test_a1111_around_it(webui: Any, gate: Gate) -> None:
    assert set(webui.util_get_sampler_names()) == set(OFFERED)
    assert set(webui.util_get_model_names()) == {gate.slug, "micro"}
    assert webui.util_get_current_model() == gate.slug
    assert "karras" in webui.util_get_scheduler_names()
    assert webui.get_scripts() == {"txt2img": [], "img2img": []}
    chosen = webui.txt2img(prompt="x", override_settings={"sd_model_checkpoint": "micro"})
    assert chosen.image.size == (512, 512)


def test_a1111_progress(gate: Gate) -> None:
    key = gate.make_key()
    api = webuiapi.WebUIApi(port=gate.settings.port, username="x", password=key)
    assert api.get_progress()["state"]["job_count"] == 0
    with gate.client(key) as client:
        url = client.post("/v2/micro", json={"prompt": "run"}).json()["response_url"]
        there = api.get_progress()
        client.delete(url)
    api.session.close()
    assert there["state"]["job_count"] == 1 and there["state"]["sampling_steps"] == 25
    assert 0 <= there["progress"] < 1 and there["state"]["job"] in url


def test_a1111_progress_does_not_read_the_history(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(history, "find")
    with gate.client(gate.make_key()) as client:
        jobs = [client.post("/v2/micro", json={"prompt": "run"}).json() for _ in range(2)]
        state = client.get("/sdapi/v1/progress").json()["state"]
        for job in jobs:
            client.delete(job["response_url"])
    assert (state["job"], state["job_count"]) == (jobs[0]["request_id"], 2)


def test_a1111_too_fast(gate: Gate) -> None:
    key = gate.make_key(rpm=1)
    asked = [
        httpx.post(f"{gate.url}/sdapi/v1/txt2img", json={"prompt": "x"}, headers={"x-api-key": key})
        for _ in range(2)
    ]
    assert [answer.status_code for answer in asked] == [200, 429]
    assert 1 <= int(asked[1].headers["retry-after"]) <= 61


def test_a1111_names_of_samplers() -> None:
    assert {ours for named in SAMPLERS.values() for ours in named.values()} == set(SCHEDULERS)
    assert all(name.lower() in SAMPLERS for name in (*OFFERED, *SCHEDULERS))
    assert SAMPLERS["dpm++ 2m"]["uniform"] == "DPM Multi"
    assert SAMPLERS["plms"]["automatic"] == "PNDM"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"enable_hr": True}, "enable_hr"),
        ({"restore_faces": True}, "restore_faces"),
        ({"tiling": True}, "tiling"),
        ({"styles": ["bold"]}, "styles"),
        ({"subseed_strength": 0.3}, "subseed_strength"),
        ({"script_name": "x/y/z plot"}, "script_name"),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"image": "x"}]}}}, "alwayson_scripts"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, "override_settings"),
        ({"sampler_name": "DPM++ SDE"}, "sampler_name"),
        ({"sampler_name": "Euler", "scheduler": "karras"}, "scheduler"),
        ({"sampler_name": "DDIM"}, "eta"),  # webuiapi sends eta 1, which is not DDIM's
        ({"sampler_name": "Euler a", "eta": 0.5}, "eta"),
        ({"batch_size": 3, "n_iter": 2}, "n_iter"),
        ({"batch_size": 9}, "batch_size"),
        ({"s_churn": 1}, "s_churn"),
        ({"cfg_scale": 99}, "cfg_scale"),
        ({"steps": 3}, "steps"),
        ({"width": 333}, "width"),
    ],
)
def test_a1111_refuses_by_name(webui: Any, given: dict[str, Any], field: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        webui.txt2img(**{"prompt": "x", **given})
    assert caught.value.args[0] == 400
    assert f'"detail":"{field} ' in caught.value.args[1]


def test_a1111_ddim_and_switched_off_scripts(webui: Any) -> None:
    off = {"ADetailer": {"args": [False]}, "ControlNet": {"args": []}}
    assert webui.txt2img(prompt="x", sampler_name="DDIM", eta=0, alwayson_scripts=off).image


def test_a1111_by_header_and_without(gate: Gate) -> None:
    url = f"{gate.url}/sdapi/v1/txt2img"
    body = {"prompt": "x", "send_images": False, "steps": 10}
    made = httpx.post(url, json=body, headers={"x-api-key": gate.key}).json()
    assert made["images"] == [] and made["parameters"]["num_inference_steps"] == 10
    assert httpx.post(url, json=body, auth=("me", "SG_wrong")).status_code == 401
    for header in ("Basic !", "Basic", "Basic /w==", f"Bearer {gate.key}"):
        answer = httpx.post(url, json=body, headers={"authorization": header})
        assert (answer.status_code, answer.json()["code"]) == (401, "key_missing")
    failed = httpx.post(url, json={"prompt": "fail: no luck"}, headers={"x-api-key": gate.key})
    assert (failed.status_code, failed.json()["detail"]) == (422, "no luck")
    assert failed.headers["x-rate-limit-limit"] == "100000"
