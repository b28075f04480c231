"""A diffusers folder: a config and safetensors files for each net."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from imaged.checkpoint_info.metadata import read_json
from imaged.engine.nets.net import Tensors
from imaged.errors import CheckpointRefused
from imaged.weight_files import CONVERT, Header

NETS = ("unet", "vae", "text_encoder", "text_encoder_2")
PARTS = (*NETS, "tokenizer", "tokenizer_2", "scheduler")
TABLES = (".json", ".txt")  # configs and vocabularies
Part = tuple[Mapping[str, Any], Tensors]  # config.json of a net and its weights


def read_folder(folder: Path, given: Mapping[str, Part]) -> dict[str, Part]:
    """Config and tensors of each net that is not given; raises CheckpointRefused."""
    index = folder / "model_index.json"
    if not index.is_file():
        files = [path.name for path in sorted(folder.glob("*.safetensors"))]
        hint = f"; if {files[0]} is meant, name the file" if files else ""
        raise CheckpointRefused(f"the folder {folder.name} has no model_index.json{hint}")
    kind = str(read_json(index).get("_class_name", ""))
    if kind and not kind.startswith("StableDiffusionXL"):
        raise CheckpointRefused(f"the folder {folder.name} holds a {kind}, not an SDXL checkpoint")
    missing = [part for part in PARTS if part not in given and not (folder / part).is_dir()]
    if missing == ["text_encoder", "tokenizer"]:
        raise CheckpointRefused(
            f"{folder.name} is the SDXL refiner, which makes no picture by itself"
        )
    if missing:
        raise CheckpointRefused(f"the folder {folder.name} lacks {', '.join(missing)}")
    return {part: given.get(part) or read_part(folder / part) for part in NETS}


def read_part(folder: Path) -> Part:
    """Config and memory-mapped tensors of one net; raises CheckpointRefused."""
    tensors: dict[str, Any] = {}
    for file in _weights(folder):
        header = Header.read(file)
        header.refuse_odd_types(key for key in header.shapes if not key.endswith("position_ids"))
        tensors |= load_file(file)
    return read_json(folder / "config.json"), tensors


def folder_files(folder: Path) -> Iterator[Path]:
    """All files that are read."""
    for inner in (folder, *(folder / part for part in PARTS)):
        if inner.is_dir():
            yield from (path for path in sorted(inner.iterdir()) if path.suffix in TABLES)
        if inner.name in NETS and inner.is_dir():
            yield from _weights(inner)


def _weights(folder: Path) -> list[Path]:
    """The weight files of a net, full precision preferred to fp16; raises CheckpointRefused."""
    for variant in ("", r"\.fp16"):
        form = re.compile(rf"(diffusion_pytorch_)?model{variant}(-\d+-of-(\d+))?\.safetensors")
        found = {path: form.fullmatch(path.name) for path in sorted(folder.iterdir())}
        files = {path: match for path, match in found.items() if match}
        for path, match in files.items():
            if len(files) != int(match[3] or 1):
                raise CheckpointRefused(
                    f"{folder.name} should hold {int(match[3] or 1)} files like {path.name} and "
                    f"holds {len(files)}"
                )
        if files:
            return list(files)
    pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".ckpt")]
    hint = f"; {pickles[0]} is a pickle: {CONVERT}" if pickles else ""
    raise CheckpointRefused(f"{folder.name} has no safetensors weights{hint}")
