"""The scenes that micro is trained on, the words for them, and the training from end to end."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageChops

from imaged.catalogue.model import MICRO
from imaged.engine.loading.load import load
from imaged.params.image_params import ImageParams
from training.micro import evaluate, train
from training.micro.architecture import build_unet
from training.micro.evaluate import (
    END,
    SIZES,
    START,
    Exam,
    Kept,
    clipped,
    into_card,
    report,
)
from training.micro.judge import Judge, labels, view
from training.micro.parts import assembled, export, unet, vae
from training.micro.parts.run import save_state
from training.micro.parts.text import Conditioner, Reader, find
from training.micro.scenes.captions import caption, choose, phrases, tell, vocabulary, weighed
from training.micro.scenes.painter import draw
from training.micro.scenes.scene import ATTRIBUTES, Scene, any_scene, held_out, sample_scene
from training.micro.sheets import PROMPTS, contact_sheet, generate, seed_jobs

FULL = Scene(
    time="noon",
    mountains="snowed",
    ground="lake",
    trees="pine",
    building="house",
    walls="red",
    boat="blue",
    figure="full",
    hair="red",
    braids=True,
    shield=True,
    dress="mail",
    seed=3,
)


def difference(a: Scene, b: Scene) -> float:
    """Share of the pixels that differ between two painted scenes."""
    pictures = [draw(s, 192, 192) for s in (a, b)]
    changed = ImageChops.difference(*pictures).convert("L").point(lambda v: 255 if v > 8 else 0)
    return changed.histogram()[255] / (192 * 192)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_kind_of_every_attribute_shows(name: str) -> None:
    others = [k for k in ATTRIBUTES[name] if k != getattr(FULL, name)]
    without = {"walls": "none", "hair": "none", "dress": "none"}
    for kind in others:
        if kind == without.get(name):
            continue  # that is the building or the figure left out
        changed: dict[str, Any] = {name: kind}
        assert difference(FULL, replace(FULL, **changed)) > 0.002, kind


def test_a_scene_is_painted_the_same_again_and_in_any_shape() -> None:
    assert draw(FULL, 128, 192).tobytes() == draw(FULL, 128, 192).tobytes()
    assert draw(FULL, 128, 192).size == (128, 192)
    assert difference(FULL, replace(FULL, seed=4)) > 0.1


def test_training_never_sees_what_is_held_out() -> None:
    rng = random.Random(1)
    assert not any(held_out(sample_scene(rng)) for _ in range(2000))
    assert all(held_out(sample_scene(rng, unseen=True)) for _ in range(200))


def test_what_shows_can_be_said() -> None:
    rng = random.Random(2)
    for _ in range(300):
        scene = any_scene(rng)
        said = phrases(scene)
        for name, kinds in ATTRIBUTES.items():
            name = "building" if name == "walls" else name
            if getattr(scene, name) not in ("none", False):
                assert said[name], (name, kinds)
        told = choose(scene, rng, 1.0)
        text = tell(scene, told, rng)
        assert told.keys() >= {"time", "ground"}
        assert all(phrase in text for phrase in told.values())


def test_captions_hold_known_words_only() -> None:
    """But for "masterpiece", which stands for any unknown one."""
    text = Conditioner()
    known = {i for p in (*vocabulary(), "masterpiece") for i in text.tokens(p)}
    known |= {text.tokenizer.start, text.tokenizer.end}
    rng = random.Random(3)
    for windows in (1, 2, 3, 4):
        captions = [caption(any_scene(rng), rng, windows) for _ in range(100)]
        ids, weights = text.windows(captions, windows)
        assert set(ids.flatten().tolist()) <= known
        assert 0.3 <= weights.min() < 1 < weights.max() <= 1.5


def test_a_phrase_is_as_true_as_it_weighs() -> None:
    rng = random.Random(4)
    right: list[float] = []  # more than its weight lets expect, of those between the two ends
    for _ in range(4000):
        for name, words in weighed(FULL, {}, rng).items():
            phrase, text = words.strip("()").split(":")
            true, weight = phrase in phrases(FULL)[name], float(text)
            if 0.745 < weight < 0.995:
                right.append(true - (weight - 0.75) / 0.25)
            else:
                assert true == (weight > 0.9)
    assert len(right) > 500
    assert abs(sum(right) / len(right)) < 0.1


def test_weights_reach_the_context() -> None:
    text = Conditioner().eval()
    ids, weights = text.windows(["a lake, (a red house:0.5)", ""], 2)
    assert ids.shape == weights.shape == (2, 2, 77)
    assert weights[0, 0].tolist() == [1.0] * 4 + [0.5] * 3 + [1.0] * 70
    with torch.inference_mode():
        plain, weighted = (text(ids, w)[0] for w in (torch.ones_like(weights), weights))
    assert torch.equal(weighted, plain * weights.view(2, -1, 1))


def test_log_odds_are_of_the_judges_probabilities() -> None:
    judge = Judge().eval()
    image = draw(FULL, 128, 128)
    logits = judge(view(image)[None].float() / 127.5 - 1)
    for name, odds in judge.log_odds([image]).items():
        assert torch.allclose(odds.sigmoid(), logits[name].softmax(-1), atol=1e-5)


def test_unknown_tokens_have_no_embedding_in_the_shipped_checkpoint() -> None:
    nets, text = load(MICRO), Conditioner()
    ends = {text.tokenizer.start, text.tokenizer.end}
    known = sorted(ends | {i for p in vocabulary() for i in text.tokens(p)})
    for encoder in (nets.text_encoder, nets.text_encoder_2):
        table = encoder.embeddings.token_embedding.weight
        assert bool(table[known].any(1).all())
        rest = torch.ones(len(table), dtype=torch.bool)
        rest[known] = False
        assert not bool(table[rest].any())


def test_a_phrase_is_asked_where_it_ends() -> None:
    assert find([9, 1, 2, 1, 3, 9], [1, 3]) == (3, 5)
    assert find([9, 1, 2], [2, 3]) is None
    reader = Reader()
    text = "a red house, a blue boat"
    ids = reader.text.windows([text], 1)[0][0].tolist()
    spots = reader._places([FULL], [{"building": "a red house", "boat": "a blue boat"}], ids)
    house, boat = 3, 7  # the start token and the comma count too
    assert spots["walls"] == [(0, house, 1)]
    assert spots["building"] == [(0, house, 1)]
    assert spots["boat"] == [(0, boat, 3)]


def test_a_phrase_of_the_shipped_checkpoint_tells_of_itself_only() -> None:
    """The context of every other token is nearly the same with another phrase in its place."""
    text = Conditioner()
    pair = [
        type(net).from_pretrained(MICRO, subfolder=part)
        for net, part in ((text.one, "text_encoder"), (text.two, "text_encoder_2"))
    ]
    ids, weights = text.windows(["a red house, a starry night", "a blue house, a starry night"], 1)

    def apart(one: torch.nn.Module, two: torch.nn.Module) -> tuple[float, float]:
        text.one, text.two = one, two
        with torch.inference_mode():
            red, blue = text(ids, weights)[0]
        moved = (red - blue).square().mean(1) / red.var()
        return float(moved[2:4].mean()), float(moved[4:].mean())

    inside, outside = apart(*pair)
    assert inside > 0.01
    assert outside < 0.001
    assert apart(*Conditioner().eval().children())[1] > 0.01  # encoders as they begin


def test_the_judge_is_asked_in_the_order_of_its_heads() -> None:
    assert labels(FULL) == [0, 1, 4, 1, 1, 1, 3, 2, 1, 1, 1, 1]
    heads = Judge().eval()(torch.zeros(1, 3, 128, 128))
    assert {n: v.shape[1] for n, v in heads.items()} == {n: len(k) for n, k in ATTRIBUTES.items()}


@pytest.mark.slow
def test_the_whole_training_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part runs, goes on where it was stopped, and the export is served by the engine."""
    monkeypatch.setattr(assembled, "PROMPTS", PROMPTS[:1])  # of the sheet of samples
    monkeypatch.setattr(unet, "BATCHES", defaultdict(lambda: 2))
    monkeypatch.setattr(vae, "reconstructions", partial(vae.reconstructions, count=1))
    work, out = tmp_path / "work", tmp_path / "micro"

    def run(*args: str) -> str:
        result = CliRunner().invoke(train.main, ["--work", str(work), *args])
        assert result.exit_code == 0, result.output
        return result.output

    for part, first in (("latents", "vae"), ("unet", "text"), ("export", "unet")):
        result = CliRunner().invoke(train.main, ["--work", str(work), part])
        assert result.exit_code == 1
        assert f"run the part `{first}` first" in result.output
    run("vae", "--steps", "3", "--pictures", "6", "--save-every", "2")
    run("vae", "--steps", "4", "--pictures", "6", "--save-every", "2")
    steps = [json.loads(line)["step"] for line in (work / "vae.jsonl").read_text().splitlines()]
    assert steps == [0]
    assert torch.load(work / "vae.pt", weights_only=True)["step"] == 4
    few = ("--statistics", "2", "--small", "4", "--medium", "2", "--large", "1")
    run("latents", *few)
    z = torch.load(work / "latents-256.pt", weights_only=True)["latents"].float()
    assert z.shape == (4, 4, 32, 32)
    assert bool(((z.std((0, 2, 3)) > 0.2) & (z.std((0, 2, 3)) < 5)).all())
    assert "time: named right in" in run("text", "--steps", "2", "--batch", "4")
    run("unet", "--steps", "2")
    assert "MB" in run("export", "--out", str(out))
    for name in ("vae", "text", "unet"):
        with Image.open(work / f"{name}.png") as loss:
            assert loss.width == 800
    for name in ("vae", "unet"):
        with Image.open(work / f"{name}.jpg") as sheet:
            assert sheet.width > 300
    picture = generate(
        load(out), [ImageParams("a lake", seed=7, img_width=256, img_height=256)], "test"
    )[0]
    assert picture.size == (256, 256)


def test_an_export_may_be_a_mean_with_earlier_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of weights that are larger by one moves each by a quarter."""
    now = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    save_state(tmp_path / "unet.pt", average=now)
    save_state(tmp_path / "before.pt", average={name: w + 1 for name, w in now.items()})
    exported: dict[str, torch.Tensor] = {}

    def parts(_: Path, weights: dict[str, torch.Tensor]) -> dict[str, object]:
        exported.update(weights)
        return {}

    monkeypatch.setattr(export, "parts_of", parts)
    options = ("--mix", str(tmp_path / "before.pt"), "--share", "0.25", "--text-scale", "1")
    command = ["--work", str(tmp_path), "export", "--out", str(tmp_path / "out"), *options]
    (tmp_path / "out").mkdir()
    result = CliRunner().invoke(train.main, command)
    assert result.exit_code == 0, result.output
    for name, weight in now.items():
        torch.testing.assert_close(exported[name], weight + 0.25)


def test_an_export_reads_texts_as_if_they_weighed_less(tmp_path: Path) -> None:
    """Scaled keys and values are what a weight does to the tokens, for every token."""
    net = build_unet().eval()
    less = build_unet().eval()
    less.load_state_dict(export.scaled(net.state_dict(), 0.5))
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 64)
    added = {"text_embeds": torch.randn(1, 64), "time_ids": torch.ones(1, 6)}
    with torch.inference_mode():
        whole, half, scaled = (
            n(x, 500, c, added_cond_kwargs=added).sample
            for n, c in ((net, context), (net, 0.5 * context), (less, context))
        )
    torch.testing.assert_close(scaled, half)
    assert not torch.allclose(scaled, whole, atol=1e-3)


def test_sheets_and_card(tmp_path: Path) -> None:
    images = [Image.new("RGB", (64, 64), c) for c in ("red", "green", "blue")]
    sheet = contact_sheet(images, ["one", "two", "words " * 40], columns=2, width=100)
    assert sheet.width == 208
    assert sheet.height > 2 * 100 + 2 * 17 * 5
    assert [j.seed for j in seed_jobs(3)] == [0, 1, 2]
    assert clipped(images[0]) == 1.0
    card = tmp_path / "README.md"
    card.write_text(f"# micro\n{START}\nold\n{END}\nweaknesses\n")
    into_card(card, ["new"])
    assert card.read_text() == f"# micro\n{START}\nnew\n{END}\nweaknesses\n"
    kept = Kept(tmp_path / "kept.json")
    assert kept("a", lambda: [1]) == [1]
    assert Kept(tmp_path / "kept.json")("a", lambda: [2]) == [1]


def test_the_exam_passes_who_paints_what_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the painter in the checkpoint's place; nothing is asked twice."""
    exam = Exam(MICRO, prompts=4)
    calls: list[str] = []

    def paint(nets: object, jobs: list[ImageParams], desc: str) -> list[Image.Image]:
        calls.append(desc)
        return [draw(exam.scenes[n % 4], 256, 256) for n in range(len(jobs))]

    monkeypatch.setattr(evaluate, "generate", paint)
    kept = Kept(tmp_path / "kept.json")
    kept.results |= {"psnr 200": 30.0, "judge": dict.fromkeys(ATTRIBUTES, 1.0)}
    lines = report(exam, kept, 4)
    rows = {line.split("|")[1].strip(): line.split("|")[2] for line in lines if "**" in line}
    assert len(rows) == 1 + 4 + 13 + 4 + 1
    assert all(float(rows[size].strip(" *%")) >= 95 for size in SIZES)
    asked = len(calls)
    assert asked == 4 + 13 + 3 + 1 + 2 * 6 + 1 + 1  # guidance 7 is the default sampler's row
    assert report(exam, kept, 4) == lines
    assert len(calls) == asked
    of_another = [draw(s, 256, 256) for s in (*exam.scenes[1:], exam.scenes[0])]
    assert evaluate.share(exam.mark(of_another)["marks"]) < 0.8
