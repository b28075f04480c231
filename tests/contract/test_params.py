"""Contract 4: the parameters of this model, odd input, and the wider ranges of aliases; 10."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imaged.catalogue import toml
from imaged.catalogue.aliases import load
from imaged.catalogue.model import DEFAULT_SLUG, MICRO
from imaged.engine.sampling.tables import table
from imaged.errors import CommandError
from imaged.params.knobs import KNOBS, WIDEST
from imaged.sampling.schedulers import SCHEDULERS, unet_calls
from tests.conftest import QUICK, SLUG, Server
from tests.contract.gate import Gate

FORMS = [
    "(masterpiece, extremely detailed, professional photography), (freckles:0.5, moles:0.5)",
    "(the Grumpy Cat:1.25), (caricature:0.2), ( best quality:1.9)",
    "(worst quality, low quality:1.4), ((cinematic photo:1.3))",
    "[deformed | disfigured], [bad : wrong] anatomy, [extra | missing | floating] limb",
    "easynegative, bad-hands-5, bad_prompt_version2, By bad artist -neg, conysv3-1400",
    "(" * 300 + "x" + ":9" * 300,
    "a, " * 3000,
]


def post(gate: Gate, slug: str = "", **params: Any) -> Any:
    with gate.client() as client:
        return client.post(f"/v1/{slug or gate.slug}", json={"prompt": "x", **params})


def test_the_table() -> None:
    known: dict[str, tuple[Any, ...]] = {
        k.name: (k.default, k.low, k.high, k.required) for k in KNOBS
    }
    assert known["prompt"][3] and not known["negative_prompt"][3]
    assert known["samples"] == (1, 1, 4, False)
    assert known["num_inference_steps"] == (25, 20, 100, False)
    assert known["guidance_scale"] == (7.0, 1, 15, False)
    assert known["seed"] == (-1, -1, 999_999_999_999_999, False)
    assert known["img_width"] == known["img_height"] == (1024, 512, 2048, False)
    assert known["base64"][0] is False
    assert {k.multiple for k in KNOBS if k.name.startswith("img_")} == {8}


def test_thirteen_schedulers(gate: Gate) -> None:
    assert len(SCHEDULERS) == 13
    for scheduler in SCHEDULERS:
        answer = post(gate, scheduler=scheduler, img_width=512, img_height=512)
        assert answer.status_code == 200, scheduler


def test_the_pages_own_request(gate: Gate) -> None:
    answer = post(gate, **toml.built_in()[DEFAULT_SLUG].sample)
    assert answer.status_code == 200
    assert answer.headers["x-seed-value"] == "565481734"


def test_seeds(gate: Gate) -> None:
    drawn = {post(gate, seed=-1).headers["x-seed-value"] for _ in range(3)}
    drawn.add(post(gate).headers["x-seed-value"])
    assert len(drawn) == 4 and all(0 <= int(s) < 10**15 for s in drawn)
    for seed in (0, 999_999_999_999_999):
        assert post(gate, seed=seed).headers["x-seed-value"] == str(seed)


def test_foreign_fields_are_ignored(gate: Gate) -> None:
    foreign = {"style": "base", "strength": 0.75, "refiner": True, "high_noise_fraction": 0.8}
    with gate.client() as client:
        answer = client.post(f"/v2/{gate.slug}", json={"prompt": "x", **foreign})
    assert answer.status_code == 200 and len(answer.json()["warnings"]) == 4


def test_the_npm_clients_negative_prompt_counts(gate: Gate) -> None:
    key = gate.make_key()
    with gate.client(key) as client:
        client.post(f"/v1/{gate.slug}", json={"prompt": "x", "negativePrompt": "trees"})
        row = client.get("/inference-request/request-history").json()["data"][0]
    assert row["request_body"]["negative_prompt"] == "trees"


def test_numbers_as_text_and_null(gate: Gate) -> None:
    answer = post(
        gate,
        samples="1",
        num_inference_steps="25",
        guidance_scale="8",
        seed="468685",
        img_width=None,
    )
    assert (answer.status_code, answer.headers["x-seed-value"]) == (200, "468685")
    assert post(gate, seed=None).status_code == 200


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_inference_steps", "many", "num_inference_steps should be an integer between"),
        ("prompt", 5, "prompt should be a string"),
        ("prompt", None, "prompt is mandatory"),
        ("num_inference_steps", 19, "should be an integer between 20 and 100"),
        ("guidance_scale", 15.5, "should be a number between 1 and 15"),
        ("img_width", 1001, "should be a multiple of 8 between 512 and 2048"),
        ("scheduler", "Euler z", 'should be one of "DDIM"'),
    ],
)
def test_wrong_values_are_named(gate: Gate, field: str, value: Any, words: str) -> None:
    answer = post(gate, **{field: value})
    assert answer.status_code == 400 and words in answer.json()["error"]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f[:20])
def test_prompts_as_people_write_them(gate: Gate, form: str) -> None:
    answer = post(gate, prompt=form, negative_prompt=form, img_width=512, img_height=512)
    assert answer.status_code == 200


# -- aliases ----------------------------------------------------------------------------------


def test_aliases_take_wider_ranges(gate: Gate) -> None:
    small = {"img_width": 256, "img_height": 256}
    for slug in ("sdxl1.0-txt2img", "sdxl-lightning"):
        for more in ({"num_inference_steps": 4}, {"guidance_scale": 20}, {"guidance_scale": 0}):
            assert post(gate, slug, **small, **more).status_code == 200, (slug, more)
        for wrong in ({"num_inference_steps": 3}, {"img_width": 248}, {"guidance_scale": 31}):
            assert post(gate, slug, **wrong).status_code == 400
    assert post(gate, num_inference_steps=8).status_code == 400


def test_aliases_are_listed(gate: Gate) -> None:
    with gate.client() as client:
        models = {m["slug"]: m for m in client.get("/v1/models").json()["models"]}
    assert models[gate.slug]["aliases"] == ["sdxl1.0-txt2img", "sdxl-lightning", "sketch"]
    assert models["micro"]["aliases"] == []


def test_aliases_have_their_own_defaults(gate: Gate) -> None:
    key = gate.make_key()
    with gate.client(key) as client:
        for slug in ("sdxl-lightning", "sketch"):
            client.post(f"/v1/{slug}", json={"prompt": "x"})
        rows = client.get("/inference-request/request-history").json()["data"]
    steps = [row["request_body"]["num_inference_steps"] for row in rows]
    assert steps == [6, 8] and rows[0]["model_name"] == gate.slug


def test_the_engine_makes_the_smallest_with_every_sampler(server: Server) -> None:
    small = {"num_inference_steps": 4, "img_width": 256, "img_height": 256, "seed": 5}
    with server.client() as client:
        ids = []
        for n, scheduler in enumerate(SCHEDULERS):
            body = {**small, "scheduler": scheduler, "guidance_scale": (0, 1, 2, 30)[n % 4]}
            made = client.post("/v2/sdxl-lightning", json={"prompt": "a house", **body})
            ids.append(made.json()["request_id"])
        ended = [server.wait(job_id) for job_id in ids]
    assert {body["status"] for body in ended} == {"COMPLETED"}


def test_the_widest_ranges_are_what_samplers_can_do() -> None:
    config = json.loads((MICRO / "scheduler" / "scheduler_config.json").read_text())
    for steps in WIDEST["num_inference_steps"]:
        for scheduler in SCHEDULERS:
            traced = table(scheduler, steps, config)
            assert traced.rows.isfinite().all()
            assert len(traced.timesteps) == unet_calls(scheduler, steps), scheduler


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[alias.x]", 'should name its model = "..."'),
        ('[alias.X]\nmodel = "y"', "a slug is lower-case"),
        ('[alias.x]\nmodel = "y"\nseed = {low = 1}', "may set"),
        ('[alias.x]\nmodel = "y"\nimg_width = {low = 8}', "should stay between 256 and 2048"),
        ('[alias.x]\nmodel = "y"\nimg_width = {default = 257}', "the default img_width"),
        ('[alias.x]\nmodel = "y"\nimg_width = {low = "a"}', "should be numbers"),
        ('[alias.x]\nmodel = "y"\nimg_width = 512', "should be numbers"),
        ("[models]", "tables"),
        ("alias = 5", "tables"),
        ("[", "cannot be read"),
    ],
)
def test_a_wrong_file_of_aliases_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "aliases.toml"
    path.write_text(text)
    with pytest.raises(CommandError) as caught:
        load(path)
    assert words in caught.value.detail


def test_the_same_seed_gives_the_same_bytes(server: Server) -> None:
    with server.client() as client:
        first, second = (
            client.post(f"/v1/{SLUG}", json={**QUICK, "seed": 77, "scheduler": "Euler a"}).content
            for _ in range(2)
        )
        other = client.post(f"/v1/{SLUG}", json={**QUICK, "seed": 78, "scheduler": "Euler a"})
    assert first == second != other.content
