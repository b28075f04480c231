"""LoRA over the API: named by a field or in the prompt, and refused before it costs anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imaged.prompt import Lora
from imaged.store.jobs import queue
from tests.contract.gate import Gate


@pytest.fixture
def folder(gate: Gate) -> Iterator[Path]:
    folder = gate.settings.loras_folder
    folder.mkdir()
    for name in ("ink", "clay v1.2"):
        (folder / f"{name}.safetensors").write_bytes(b"looked at by the worker")
    yield folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def post(gate: Gate, prompt: str = "x", **params: Any) -> Any:
    with gate.client() as client:
        return client.post(f"/v1/{gate.slug}", json={"prompt": prompt, **params})


def asked(gate: Gate, answer: Any) -> tuple[Lora, ...]:
    assert answer.status_code == 200, answer.text
    job_id = answer.headers["x-request-id"]
    with gate.database.read() as c:
        return queue.read(c, [job_id])[job_id].params.all_loras


def test_the_field_and_the_prompt(gate: Gate, folder: Path) -> None:
    one, two = Lora("ink", 0.8, 0.8), Lora("clay v1.2")
    field = [{"name": "ink", "weight": 0.8}, "clay v1.2"]
    assert asked(gate, post(gate, loras=field)) == (one, two)
    assert asked(gate, post(gate, loras=json.dumps(field))) == (one, two)  # as in a form
    assert asked(gate, post(gate, "a <lora:ink:0.8> b", loras=["clay v1.2"])) == (two, one)
    with gate.client() as client:
        form = {"prompt": (None, "x"), "loras": (None, '["ink"]')}
        assert asked(gate, client.post(f"/v1/{gate.slug}", files=form)) == (Lora("ink"),)
        listed = client.get("/sdapi/v1/loras").json()
    assert [entry["name"] for entry in listed] == ["clay v1.2", "ink"]


@pytest.mark.parametrize(
    ("loras", "said"),
    [
        ("ink", "loras should be a list of at most 8"),
        ({"name": "ink"}, "loras should be a list"),
        ([1], "loras should be a list"),
        (["../ink"], "not an entry without a name of a file"),
        ([{"name": "ink", "weight": 11}], "not a weight beyond these"),
        ([{"name": "ink", "weight": "1"}], "not a weight beyond these"),
        ([{"name": "ink", "scale": 1}], "loras should be a list"),
        ("[" * 3000, "not other text"),
        (["ink"] * 9, "loras should be a list of at most 8"),
        (["none"], r"loras should name files of this server (clay v1.2, ink)"),
    ],
    ids=str,
)
def test_what_is_refused(gate: Gate, folder: Path, loras: Any, said: str) -> None:
    answer = post(gate, loras=loras)
    assert answer.status_code == 400
    assert answer.json()["code"] == "bad_parameter" and said in answer.json()["error"]


def test_a_prompt_may_not_name_what_is_not_there(gate: Gate, folder: Path) -> None:
    assert "should name files" in post(gate, "<lora:none:1>").json()["error"]
    for weight in ("9999", "-10.5", "1:11"):
        strong = post(gate, f"<lora:ink:{weight}>")
        assert strong.status_code == 400 and "weights between -10 and 10" in strong.json()["error"]
    many = post(gate, "<lora:ink:1>" * 9)
    assert many.status_code == 400 and "at most 8" in many.json()["error"]
    assert post(gate, "<lora:../ink:1>").status_code == 200  # no name of a file: it is a word


def test_a_repeat_does_not_need_the_file_any_more(gate: Gate, folder: Path) -> None:
    request = {"prompt": "x", "seed": 5, "loras": ["ink"]}
    with gate.client() as client:

        def again(word: str, **params: Any) -> Any:
            sent = {"Idempotency-Key": word}
            return client.post(f"/v2/{gate.slug}", json={**request, **params}, headers=sent)

        first = again("with-ink").json()["request_id"]
        (folder / "ink.safetensors").unlink()
        assert again("with-ink").json()["request_id"] == first
        assert again("with-ink", seed=6).status_code == 409  # not a repeat
        assert again("another").status_code == 400


def test_without_a_folder_there_are_none(gate: Gate) -> None:
    assert "(none)" in post(gate, loras=["ink"]).json()["error"]
    with gate.client() as client:
        assert client.get("/sdapi/v1/loras").json() == []
