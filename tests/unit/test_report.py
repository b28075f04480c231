"""What is told of a prompt is what the engine makes of it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import CLIPTokenizer

from imaged.catalogue.model import MICRO, Weights
from imaged.checkpoint_info.explain import Explainer, reports, taken, warnings
from imaged.checkpoint_info.metadata import text_widths, tokenizers
from imaged.errors import CheckpointRefused
from imaged.params.image_params import read_params
from imaged.params.knobs import KNOBS
from imaged.prompt import Prompt, Reading
from imaged.prompt.embeddings import Embeddings
from imaged.prompt.report import Reader, Report, problems
from imaged.prompt.windows import MAX_WINDOWS, read_windows
from imaged.sampling.schedulers import IN_A1111, SCHEDULERS


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder, widths = tmp_path_factory.mktemp("embeddings"), text_widths(MICRO)
    for name, count in (("bad_hands", 2), ("style", 1)):
        sides = zip(("clip_l", "clip_g"), widths, strict=True)
        save_file(
            {k: np.zeros((count, w), np.float32) for k, w in sides}, folder / f"{name}.safetensors"
        )
    return Reader(tokenizers(MICRO), Embeddings(folder, widths))


def tokens(report: Report, text: int = 0, encoder: int = 0) -> list[tuple[str, float]]:
    windows = report["texts"][text]["encoders"][encoder]["windows"]
    return [pair for w in windows for pair in zip(w["tokens"], w["weights"], strict=True)]


def test_tokens_and_weights(reader: Reader) -> None:
    told = reader.report(Prompt("(red:1.3) [house], Mountainside", steps=20))
    assert told["windows"] == 1 and told["texts"][0]["steps"] == [[1, 20]]
    weighted = [("red</w>", 1.3), ("house</w>", 0.9091), (",</w>", 1.0)]
    assert tokens(told) == [*weighted, ("mountain", 1.0), ("side</w>", 1.0)]
    assert tokens(told, encoder=1) == tokens(told)
    assert told["texts"][0]["pieces"][0] == {"text": "red", "weight": 1.3}


@pytest.mark.parametrize(
    "prompt",
    ["a red house", "a (very: tall) café, 🏔️ and 3.14 it's", "x " * 100, "a BREAK b, c", ""],
)
def test_tokens_are_the_reference_s(prompt: str, reader: Reader) -> None:
    """Its own tokenizer, piece by piece, in its own spelling where bytes are text."""
    theirs = CLIPTokenizer.from_pretrained(MICRO / "tokenizer", local_files_only=True)
    told = reader.report(Prompt(prompt, steps=20))
    expected = [
        token
        for piece in told["texts"][0]["pieces"]
        if "text" in piece
        for token in theirs.tokenize(piece["text"])
    ]
    found = [token for token, _ in tokens(told)]
    assert len(found) == len(expected)
    plain = [(a, b) for a, b in zip(found, expected, strict=True) if b.isascii()]
    assert all(a == b for a, b in plain)


def test_windows_are_those_of_the_engine(reader: Reader) -> None:
    prompt = ", ".join(["a red house by a blue lake"] * 30) + " BREAK a boat"
    told = reader.report(Prompt(prompt, steps=20))
    for tokenizer in reader.tokenizers:
        windows = read_windows(Prompt(prompt).spans[prompt], tokenizer, reader.embeddings)
        assert told["windows"] == len(windows.ids) > 3
    lengths = [len(w["tokens"]) for w in told["texts"][0]["encoders"][0]["windows"]]
    assert max(lengths) <= 75 and lengths[-1] == 2
    assert problems("prompt", told) == [
        f"prompt is read in {told['windows']} windows of 75 tokens; nothing is cut"
    ]


def test_what_changes_over_the_steps(reader: Reader) -> None:
    told = reader.report(Prompt("[red|blue] house", steps=5))
    assert [(text["steps"], tokens(told, n)[0][0]) for n, text in enumerate(told["texts"])] == [
        ([[1, 1], [3, 3], [5, 5]], "red</w>"),
        ([[2, 2], [4, 4]], "blue</w>"),
    ]
    assert reader.report(Prompt("[red|blue]", Reading("plain"), 5))["texts"][0]["steps"] == [[1, 5]]


def test_embeddings_found_and_missing(reader: Reader) -> None:
    prompt = "Bad_Hands, (style:1.2), badhandv4, EasyNegative, a 35mm photo, 8k"
    told = reader.report(Prompt(prompt, steps=20))
    assert told["embeddings"] == {
        "found": {"bad_hands": 2, "style": 1},
        "missing": ["badhandv4", "EasyNegative"],
    }
    assert tokens(told)[:2] == [
        ("<bad_hands, vector 1 of 2>", 1.0),
        ("<bad_hands, vector 2 of 2>", 1.0),
    ]
    assert ("<style, vector 1 of 1>", 1.2) in tokens(told)
    assert "badhandv4, EasyNegative" in problems("prompt", told)[0]


@pytest.mark.parametrize(
    ("character", "read_as"),
    [
        ("\n", "a space"),
        ("\u00a0", "a space"),
        ("é", "é</w>"),
        ("\u200b", "\u200b</w>"),
        ("Ａ", "<1 byte> <1 byte> <1 byte></w>"),
        ("\u202e", "<2 bytes> <1 byte></w>"),
    ],
)
def test_what_unusual_characters_become(character: str, read_as: str, reader: Reader) -> None:
    [found] = reader.report(Prompt(f"a {character} b {character}", steps=20))["characters"]
    assert found["count"] == 2 and found["code_point"] == f"U+{ord(character):04X}"
    assert found["read_as"] == read_as


def test_brackets_that_are_none_are_told_of(reader: Reader) -> None:
    told = reader.report(Prompt("a （red：1.3） house", steps=20))
    assert [p.split(",")[0] for p in problems("prompt", told)] == [
        "prompt has FULLWIDTH LEFT PARENTHESIS",
        "prompt has FULLWIDTH COLON",
        "prompt has FULLWIDTH RIGHT PARENTHESIS",
    ]


@pytest.mark.parametrize(
    "prompt", ["(" * 20_000, "1" * 20_000, "🏔️" * 10_000, "[a|b]" * 4000, "\u202e" * 20_000]
)
def test_hostile_prompts_are_told_of(prompt: str, reader: Reader) -> None:
    told = reader.report(Prompt(prompt, steps=100))
    for text in told["texts"]:
        assert all(len(e["windows"]) <= MAX_WINDOWS for e in text["encoders"])
    if told["windows"] > MAX_WINDOWS:
        assert "the request would fail" in problems("prompt", told)[0]


def test_what_was_taken_otherwise_than_written() -> None:
    body = {"prompt": "x", "scheduler": "k_euler", "steps": "30", "width": 512, "samples": 2}
    params, _ = read_params(body)
    twice = {"prompt": "x", "guidance": 5, "cfg_scale": 9}
    [last] = taken(twice, read_params(twice)[0], KNOBS)
    assert (last["field"], last["value"]) == ("cfg_scale", 9.0)
    assert [(t["field"], t["sent"], t["as"], t["value"]) for t in taken(body, params, KNOBS)] == [
        ("scheduler", "k_euler", "scheduler", "Euler"),
        ("steps", "30", "num_inference_steps", 30),
        ("width", 512, "img_width", 512),
    ]


def test_warnings_of_what_is_known_to_disappoint() -> None:
    few, _ = read_params({"prompt": "x", "scheduler": "DPM Multi", "steps": 49})
    many, _ = read_params({"prompt": "x", "scheduler": "DPM Multi", "steps": 50})
    assert "under 50 steps" in warnings(few, None)[0] and warnings(many, None) == []
    alone, _ = read_params({"prompt": "x", "negative_prompt": "y", "guidance_scale": 1})
    assert warnings(alone, None) == ["negative_prompt does nothing at guidance_scale 1"]


def test_loras_are_no_words() -> None:
    params, _ = read_params({"prompt": "a house <lora:x:0.5>", "negative_prompt": "rain"})
    told = reports(Explainer.of(Weights(MICRO)).reader, params)
    assert [token for token, _ in tokens(told["prompt"])] == ["a</w>", "house</w>"]
    negative = told["negative_prompt"]
    assert negative and [token for token, _ in tokens(negative)] == ["rain</w>"]


def test_profiles_have_their_schedulers() -> None:
    explainer = Explainer.of(Weights(MICRO))
    for profile, names in (("diffusers", SCHEDULERS), ("a1111", IN_A1111)):
        found = explainer.schedulers(profile, 25)
        assert tuple(s["name"] for s in found) == names
        assert all(s["sigmas"][-1] == 0 and s["profile"] == profile for s in found)


def test_what_compel_reads(reader: Reader) -> None:
    told = reader.report(Prompt('("a (red)1.3 house", "a lake--").and()', Reading("compel"), 20))
    assert told["windows"] == 2 and told["texts"][0]["pieces"][3:] == [
        {"break": True},
        {"text": "a", "weight": 1.0},
        {"text": "lake", "weight": 0.81},
    ]
    assert tokens(told)[:2] == [("a</w>", 1.0), ("red</w>", 1.3)]
    assert (told["texts"][0]["kind"], told["texts"][0]["weights"]) == ("and", [1.0, 1.0])
    assert told["texts"][0]["passes"] == 3 and told["emphasis"] == "compel"
    passes = " ".join(f"(a)0.{n}" for n in range(10, 70)) + " x" * 90
    many = reader.report(Prompt(passes, Reading("compel"), 9))
    assert any("passes of the text encoders" in p for p in problems("prompt", many))


def test_a_prompt_of_many_long_texts_is_told_in_part(reader: Reader) -> None:
    long = ", ".join(["a red house"] * 400)
    told = reader.report(Prompt(f"[a|b|c|d|e] {long}", steps=20))
    assert told["left_out"] == 5 - len(told["texts"]) > 0
    assert any("more texts, which are not told" in p for p in problems("prompt", told))


def test_long_words_are_no_names() -> None:
    embeddings = Embeddings(None, (0, 0))
    began = time.process_time()
    assert embeddings.missing("a" * 20_000 + " bad_hands " + "A1" * 5000) == ["bad_hands"]
    assert time.process_time() - began < 1.0


def test_what_cannot_be_read_is_told_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "secret" / "text_encoder").mkdir(parents=True)
    with pytest.raises(CheckpointRefused) as refused:
        Explainer.of(Weights(tmp_path / "secret"))
    assert str(refused.value) == "secret cannot be read: No such file or directory"
    for name in ("text_encoder", "text_encoder_2"):
        folder = tmp_path / "secret" / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointRefused, match="secret is not SDXL's"):
        Explainer.of(Weights(tmp_path / "secret"))
