"""What files of weights are, told by what is in them and never by their names."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from imaged.errors import CheckpointRefused
from imaged.weight_files import Header, digest

WHOLE = save({"a.weight": torch.zeros(4, 3), "b": torch.ones(2, dtype=torch.half)}, {"x": "y"})


def torch_saved() -> bytes:
    content = io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(3)}}, content)
    return content.getvalue()


def with_header(header: dict[str, Any], numbers: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def tensor(start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4], "data_offsets": [start, end]}


NO_FILES: list[tuple[bytes, str]] = [
    (b"", "is empty"),
    (torch_saved(), "is a pickle, as torch.save writes them: a pickle can run code"),
    (pickle.dumps({"a": 1}), "is a pickle: a pickle can run code"),
    (b"GGUF\x03\0\0\0" * 20, "is a GGUF file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
    (b"\n<!DOCTYPE html><html>sign in", "is a web page"),
    (b"<html><body>", "is a web page"),
    (b"just text, long enough to be read as one", "is not a safetensors file"),
    (b"\0" * 7, "is not a safetensors file"),
    (WHOLE[:-1], f"is cut off: it has {len(WHOLE) - 1} bytes of {len(WHOLE)}"),
    (WHOLE[:60], "is damaged: its header cannot be read"),
    (WHOLE + b"more", "is damaged: its header does not agree with itself"),
    (with_header({"a": tensor(0, 8), "b": tensor(4, 12)}, b"\0" * 12), "does not agree"),
    (with_header({"a": tensor(8, 16)}, b"\0" * 16), "does not agree"),
    (with_header({"a": {**tensor(0, 8), "shape": [1 << 60]}}, b"\0" * 8), "does not agree"),
    (with_header({"a": tensor(0, 1 << 62)}), "is cut off: it has 105 bytes of 4,6"),
    ((1 << 62).to_bytes(8, "little") + b"{}", "is cut off"),
    (with_header({"a": []}), "is damaged"),
    (with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": "no"}}), "is damaged"),
]


@pytest.mark.parametrize(("content", "said"), NO_FILES, ids=lambda v: ascii(v)[:30])
def test_what_is_no_whole_file_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointRefused, match=said):
        Header.read(path)


def test_a_cut_at_any_byte_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for length in range(len(WHOLE)):
        path.write_bytes(WHOLE[:length])
        with pytest.raises(CheckpointRefused):
            Header.read(path)


def test_a_name_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(WHOLE)
    header = Header.read(path)
    assert header.shapes == {"a.weight": (4, 3), "b": (2,)}
    assert header.dtypes == {"a.weight": "F32", "b": "F16"}
    assert header.metadata == {"x": "y"}


MIDDLE = "model.diffusion_model.middle_block.0.x"
BY_NAME: list[tuple[dict[str, Any], str]] = [
    ({"lora_unet_down_blocks_1.lora_up.weight": 1, "lora_te1_x.alpha": 1}, "is a LoRA"),
    ({"unet.down_blocks.0.to_q.lora_A.weight": 1}, "is a LoRA"),
    ({"transformer.x.hada_w1_a": 1}, "is a LoRA"),
    ({"control_model.input_hint_block.0.weight": 1}, "is a ControlNet"),
    ({"controlnet_cond_embedding.conv_in.bias": 1}, "is a ControlNet"),
    ({"clip_g": 1, "clip_l": 1}, "is a textual inversion"),
    ({"double_blocks.0.img_attn.qkv.weight": 1}, "is a FLUX model"),
    ({"model.diffusion_model.double_blocks.0.x": 1}, "is a FLUX model"),
    ({"model.diffusion_model.joint_blocks.0.x": 1}, "is a Stable Diffusion 3 model"),
    ({MIDDLE: 1, "cond_stage_model.model.ln_final.bias": 1}, "is a Stable Diffusion 2"),
    ({MIDDLE: 1, "cond_stage_model.transformer.text_model.x": 1}, "is a Stable Diffusion 1"),
    ({MIDDLE: 1, "conditioner.embedders.0.model.ln_final.bias": 1}, "is the SDXL refiner"),
    ({MIDDLE: 1, "edm_mean": 1}, "is an EDM model"),
]


@pytest.mark.parametrize(("names", "said"), BY_NAME, ids=lambda v: ascii(v)[:40])
def test_other_models_are_refused_by_name(names: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1) for name in names}, path)
    with pytest.raises(CheckpointRefused, match=said):
        Header.read(path).refuse_others()


def test_types_that_are_not_plain_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2).to(torch.float8_e4m3fn), "b": torch.zeros(2)}, path)
    header = Header.read(path)
    header.refuse_odd_types(["b"])
    with pytest.raises(CheckpointRefused, match="a is of type F8_E4M3; weights should be F16"):
        header.refuse_odd_types(["a", "b"])


def test_a_digest_is_that_of_the_file(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(WHOLE * 100_000)
    two.write_bytes(WHOLE)
    whole = digest({"any name": one})
    assert whole == hashlib.sha256(one.read_bytes()).hexdigest()
    both = digest({"a": one, "b": two})
    assert both == digest({"b": two, "a": one}) != whole
    assert both != digest({"b": one, "a": two})
    assert digest({"a": one}, lambda: True) == digest({"a": one, "b": two}, lambda: True) == ""
