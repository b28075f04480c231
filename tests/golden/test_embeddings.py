"""Textual inversion against diffusers' own loading of the same files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from imaged.catalogue.model import MICRO
from imaged.engine.prompt.encode import PromptEncoder
from imaged.errors import CheckpointRefused
from imaged.prompt.a1111 import spans
from imaged.prompt.embeddings import Embeddings, read_embedding
from imaged.prompt.windows import read_windows
from tests.tolerance import difference, in_float64, rounding

COUNTS = {"onestyle": 1, "mystyle": 3, "my-style-v1.2": 2}


@pytest.fixture(scope="module")
def widths(nets: Any) -> tuple[int, int]:
    return nets.text_encoder.config.hidden_size, nets.text_encoder_2.config.hidden_size


def vectors(count: int, widths: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(count, width, generator=generator) / 10
        for key, width in zip(("clip_l", "clip_g"), widths, strict=True)
    }


@pytest.fixture(scope="module")
def folder(widths: tuple[int, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embeddings")
    for seed, (name, count) in enumerate(COUNTS.items()):
        save_file(vectors(count, widths, seed), path / f"{name}.safetensors")
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    """The reference with every file under the word that is its name."""
    found = StableDiffusionXLPipeline.from_pretrained(
        MICRO, local_files_only=True, use_safetensors=True, add_watermarker=False
    )
    found.to(torch.float32)
    for name in COUNTS:
        state = load_file(folder / f"{name}.safetensors")
        for key, net, tokens in (
            ("clip_l", found.text_encoder, found.tokenizer),
            ("clip_g", found.text_encoder_2, found.tokenizer_2),
        ):
            found.load_textual_inversion(
                {name: state[key]}, token=name, text_encoder=net, tokenizer=tokens
            )
    return found


@pytest.mark.parametrize(
    "prompt",
    [
        "onestyle",
        "a house in mystyle, mountains",
        "my-style-v1.2 a red house, onestyle",
        "mystyle mystyle by a lake",
    ],
)
@torch.inference_mode()
def test_what_the_encoders_make_of_it(prompt: str, nets: Any, pipeline: Any, folder: Path) -> None:
    positive, _ = PromptEncoder(nets, folder).pair(prompt, None)
    context, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=True)
    with in_float64(pipeline.text_encoder, pipeline.text_encoder_2):
        exact, _, wide, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=True)
    assert difference(positive.context, context[0]) <= rounding(context, exact)
    assert difference(positive.pooled, pooled[0]) <= rounding(pooled, wide)
    plain, _ = PromptEncoder(nets).pair(prompt, None)
    assert not torch.allclose(plain.context, positive.context, atol=1e-3)


def test_names_are_words_in_any_case(widths: tuple[int, int], folder: Path) -> None:
    embeddings = Embeddings(folder, widths)
    embeddings.refresh()

    def pieces(text: str) -> list[str | int]:
        return [p if isinstance(p, str) else len(p) for p in embeddings.split(text)]

    assert pieces("a MyStyle b") == ["a ", 3, " b"]
    assert pieces("mystyles, amystyle, my_style") == ["mystyles, amystyle, my_style"]
    assert pieces("my-style-v1.2,mystyle") == ["", 2, ",", 3, ""]
    assert pieces("") == [""]


def test_an_embedding_is_not_cut(nets: Any, widths: tuple[int, int], folder: Path) -> None:
    embeddings = Embeddings(folder, widths)
    embeddings.refresh()
    windows = read_windows(spans("cat " * 73 + "mystyle"), nets.tokenizer, embeddings)
    assert [spot[:2] for spot in windows.embedded] == [(1, 1), (1, 2), (1, 3)]
    windows = read_windows(spans("cat " * 72 + "(mystyle:1.5)"), nets.tokenizer, embeddings)
    assert [spot[:2] for spot in windows.embedded] == [(0, 73), (0, 74), (0, 75)]
    assert windows.weights[0][73:76] == (1.5, 1.5, 1.5)


def test_files_come_and_go(nets: Any, widths: tuple[int, int], tmp_path: Path) -> None:
    encoder = PromptEncoder(nets, tmp_path)
    before, _ = encoder.pair("a mystyle house", None)
    save_file(vectors(2, widths), tmp_path / "mystyle.safetensors")
    there, _ = encoder.pair("a mystyle house", None)
    (tmp_path / "mystyle.safetensors").unlink()
    after, _ = encoder.pair("a mystyle house", None)
    assert torch.equal(before.context, after.context)
    assert not torch.equal(before.context, there.context)


def test_what_is_no_file_harms_nobody(nets: Any, widths: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "text.safetensors").write_text("hello")
    save_file(vectors(2, widths), tmp_path / "iris.safetensors")
    encoder = PromptEncoder(nets, tmp_path)
    for prompt in ("an iris", "a text, gone, folder"):
        encoder.pair(prompt, None)
    assert len(list(encoder.embeddings.split("an iris"))) == 3
    dotless = "an \u0131ris"  # equal without regard to case for one rule, not for the other
    assert "".join(p for p in encoder.embeddings.split(dotless) if isinstance(p, str)) == dotless


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"clip_g": None}, "is no textual inversion of SDXL"),
        ({"clip_l": torch.zeros(3, 7)}, "for other text encoders"),
        ({"clip_l": torch.zeros(2, 64)}, "for other text encoders"),
        ({"clip_l": torch.zeros(64)}, "for other text encoders"),
    ],
)
def test_what_does_not_suit_is_left_out_and_said(
    changed: dict[str, Any],
    said: str,
    widths: tuple[int, int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors = {k: v for k, v in {**vectors(3, widths), **changed}.items() if v is not None}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointRefused, match=said):
        read_embedding(tmp_path / "x.safetensors", widths)
    embeddings = Embeddings(tmp_path, widths)
    with caplog.at_level(logging.WARNING):
        embeddings.refresh()
    assert list(embeddings.split("an x")) == ["an x"]
    assert said in caplog.text


def test_too_many_vectors_are_refused(widths: tuple[int, int], tmp_path: Path) -> None:
    save_file(vectors(76, widths), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointRefused, match="between 1 and 75 vectors"):
        read_embedding(tmp_path / "x.safetensors", widths)
