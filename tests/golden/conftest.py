"""A checkpoint with SDXL's full structure at reduced width, in both layouts, made once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.sides import original_layout
from bench.sides.models import SHAPES
from imaged.catalogue.model import MICRO


def reduced_nets() -> dict[str, Any]:
    """SDXL's blocks, depths in the pattern 0-1-2, heads of 64; only the widths are small."""
    torch.manual_seed(0)
    return SHAPES["reduced"].nets()


@pytest.fixture(scope="session")
def source() -> dict[str, Any]:
    """The nets that the files are of; nobody changes them."""
    return reduced_nets()


@pytest.fixture(scope="session")
def folder(source: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "reduced"
    for name, net in source.items():
        net.save_pretrained(path / name, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(MICRO / name, path / name)
    shutil.copy(MICRO / "model_index.json", path)
    return path


@pytest.fixture(scope="session")
def single_file(source: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "reduced.safetensors"
    original_layout.write(path, source)
    return path
