"""LoRA files, applied to a checkpoint's layers at run time (decision 21).

A layer computes W x + scale * up(down(x)) while a LoRA is in use (Hu et al. 2021); W never changes.
Files name layers with underscores (most trainers; diffusers' names or the original layout's) or
with points (diffusers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cachetools import LRUCache
from safetensors.torch import load_file

from imaged.engine.loading.single_file import diffusers_name
from imaged.engine.nets.layers import Layer, LowRank
from imaged.errors import CheckpointRefused, JobFailed
from imaged.prompt import Lora
from imaged.weight_files import Header, digest

CACHED_SETS = 4  # of LoRAs, on the device
PARTS = {  # prefix of keys -> net
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "unet.": "unet",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
}
ENDS = {  # suffix of keys -> what they hold
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
OTHERS = re.compile(r"\.(hada_|lokr_|dora_scale|lora_mid|oft_|diff|lora_magnitude_vector)")


@dataclass(frozen=True)
class Change:
    """A low-rank update of one layer: down (rank, inputs, ...), up (outputs, rank, ...)."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float  # alpha / rank


Changes = Mapping[tuple[str, str], Change]  # (part, layer's name with underscores) -> change


def read_lora(path: Path) -> Changes:
    """All updates in a file; raises CheckpointRefused for other kinds of files."""
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    header = Header.read(path)
    for key in header.shapes:
        if OTHERS.search(key):
            raise CheckpointRefused(f"{path.name} has {key}: only plain LoRA is read")
    for key, value in load_file(path).items():
        part, layer, what = _place(path, key)
        found.setdefault((part, layer), {})[what] = value
    return {place: _change(path, place[1], held) for place, held in found.items()}


def _place(path: Path, key: str) -> tuple[str, str, str]:
    """(part, layer with underscores, down, up or alpha)."""
    begin = next((b for b in PARTS if key.startswith(b)), None)
    end = next((e for e in ENDS if key.endswith(e)), None)
    if begin is None or end is None:
        raise CheckpointRefused(f"{path.name} is not a LoRA of SDXL: it has {key}")
    name = key[len(begin) : -len(end)].replace(".", "_").replace("_processor_", "_")
    part = PARTS[begin]
    if end.startswith("_lora") and name.endswith("to_out"):
        name += "_0"
    if part == "unet":
        return part, diffusers_name(name), ENDS[end]
    return part, name.removeprefix("text_model_"), ENDS[end]


def _change(path: Path, layer: str, held: Mapping[str, torch.Tensor]) -> Change:
    if not {"down", "up"} <= held.keys():
        raise CheckpointRefused(f"{path.name} has half a change of {layer}")
    down, up = held["down"], held["up"]
    rank = down.shape[0]
    if up.ndim < 2 or down.ndim < 2 or up.shape[1] != rank:
        raise CheckpointRefused(f"{path.name}: the halves of {layer} do not fit together")
    alpha = float(held["alpha"]) if "alpha" in held else float(rank)
    return Change(down, up, alpha / rank)


@dataclass(frozen=True)
class LoraSet:
    """The LoRAs of one image, on the device. Equal if files, their times and weights are equal."""

    loras: tuple[Lora, ...] = ()
    files: tuple[tuple[str, int], ...] = ()  # name and time of change
    changes: Mapping[tuple[str, str], tuple[LowRank, ...]] = field(
        default_factory=dict, compare=False, repr=False
    )
    #: Name and SHA-256 of each file.
    digests: tuple[tuple[str, str], ...] = field(default=(), compare=False)


NO_LORAS = LoraSet()


class Loras:
    """The LoRA files of a folder, for one checkpoint's nets."""

    def __init__(self, nets: Mapping[str, torch.nn.Module], folder: Path | None) -> None:
        self._folder = folder
        self._layers: dict[tuple[str, str], Any] = {
            (part, name.replace(".", "_")): layer
            for part, net in nets.items()
            for name, layer in net.named_modules()
            if isinstance(layer, Layer) and hasattr(layer, "weight")
        }
        for layer in self._layers.values():
            layer.changes = ()  # whoever had the nets before may have left some
        self._used = NO_LORAS
        self._cached: LRUCache[LoraSet, LoraSet] = LRUCache(CACHED_SETS)

    def find(self, loras: tuple[Lora, ...]) -> LoraSet:
        """Read LoRAs, through an LRU cache; raises JobFailed."""
        if not loras:
            return NO_LORAS
        paths = [self._path(lora.name) for lora in loras]
        files = tuple((path.stem, path.stat().st_mtime_ns) for path in paths)
        found = self._cached.get(LoraSet(loras, files))
        if found is None:
            digests = tuple((path.stem, digest({path.name: path})) for path in paths)
            found = LoraSet(loras, files, self._read(loras, paths), digests)
            self._cached[found] = found
        return found

    def use(self, loras: LoraSet) -> None:
        """Apply these LoRAs, and no others, to the nets."""
        if loras == self._used:
            return
        for place in self._used.changes.keys() & self._layers.keys():
            self._layers[place].changes = ()
        for place in loras.changes.keys() & self._layers.keys():
            layer = self._layers[place]
            like = layer.weight
            layer.changes = tuple(
                (down.to(like.device, like.dtype), up.to(like.device, like.dtype), scale)
                for down, up, scale in loras.changes[place]
            )
        self._used = loras

    def _read(
        self, loras: tuple[Lora, ...], paths: list[Path]
    ) -> dict[tuple[str, str], tuple[LowRank, ...]]:
        changes: dict[tuple[str, str], tuple[LowRank, ...]] = {}
        for lora, path in zip(loras, paths, strict=True):
            try:
                found = read_lora(path)
            except CheckpointRefused as error:
                raise JobFailed("bad_lora", error.detail) from error
            for place, change in found.items():
                weight = lora.unet if place[0] == "unet" else lora.text
                fitted = self._fitted(lora.name, place, change, weight)
                changes[place] = (*changes.get(place, ()), fitted)
        return changes

    def _fitted(self, name: str, place: tuple[str, str], change: Change, weight: float) -> LowRank:
        """An update in its layer's shape and dtype; raises JobFailed if it does not fit."""
        layer = self._layers.get(place)
        if layer is None:
            raise JobFailed("bad_lora", f"the LoRA {name} is made for another model")
        own = layer.weight
        down, up = _shaped(change, own.ndim)
        outer = (own.shape[0], down.shape[0], *(1,) * (own.ndim - 2))
        if down.shape[1:] != own.shape[1:] or up.shape != outer:
            raise JobFailed("bad_lora", f"the LoRA {name} is made for a model of another size")
        down, up = (half.to(own.device, own.dtype, copy=True) for half in (down, up))
        return down, up, change.scale * weight

    def _path(self, name: str) -> Path:
        path = None if self._folder is None else self._folder / f"{name}.safetensors"
        if path is None or not path.is_file():
            raise JobFailed("unknown_lora", f"there is no LoRA {name} on this server")
        return path


def _shaped(change: Change, dimensions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both halves as matrices for a linear layer, as kernels for a convolution."""
    down, up = change.down, change.up
    if dimensions == 2:
        return down.flatten(1), up.flatten(1)
    return down[(...,) + (None,) * (4 - down.ndim)], up[(...,) + (None,) * (4 - up.ndim)]
