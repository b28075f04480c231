"""LoRA: a file's small changes to a checkpoint's layers, for the time of a call.

A layer with weights W gives W x + scale * up(down(x)) while a LoRA is in use (Hu et al. 2021), so
W itself never changes and nothing has to be taken back. Files name layers in two ways: with
underscores, by diffusers' names or by those of the original layout, as most trainers write them,
and with points, as diffusers does.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from imaged.engine.files import Header
from imaged.engine.nets.layers import Layer
from imaged.engine.single_file import diffusers_name
from imaged.errors import CheckpointRefused, JobFailed
from imaged.params import Lora

KEPT_FILES = 16
PARTS = {  # how keys begin -> whose layers they name
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "unet.": "unet",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
}
ENDS = {  # how keys end -> what they hold
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
    """What a LoRA does to one layer: down (rank, inputs, ...), up (outputs, rank, ...)."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float  # alpha / rank


Changes = Mapping[tuple[str, str], Change]  # (part, layer's name with underscores) -> change


def read_lora(path: Path) -> Changes:
    """Every change in a file; raises CheckpointRefused for files of another kind."""
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


class Loras:
    """The LoRA files of a folder, for one checkpoint's nets."""

    def __init__(self, nets: Mapping[str, torch.nn.Module], folder: Path | None) -> None:
        self._folder, self._parts = folder, frozenset(nets)
        self._layers = {
            (part, name.replace(".", "_")): layer
            for part, net in nets.items()
            for name, layer in net.named_modules()
            if isinstance(layer, Layer)
        }
        for layer in self._layers.values():
            layer.changes = ()  # whoever had the nets before may have left some
        self._used: tuple[Lora, ...] = ()
        self._touched: list[tuple[str, str]] = []
        self._files: OrderedDict[tuple[Path, int], Changes] = OrderedDict()

    def use(self, loras: tuple[Lora, ...]) -> None:
        """Have the nets compute with these and no others from now on; raises JobFailed."""
        if loras == self._used:
            return
        changed: dict[tuple[str, str], list[Any]] = {}
        for lora in loras:
            here = {p: c for p, c in self._changes(lora.name).items() if p[0] in self._parts}
            for place, change in here.items():
                weight = lora.unet if place[0] == "unet" else lora.text
                changed.setdefault(place, []).append(self._fitted(lora.name, place, change, weight))
        for place in self._touched:
            self._layers[place].changes = ()
        for place, changes in changed.items():
            self._layers[place].changes = tuple(changes)
        self._used, self._touched = loras, list(changed)

    def _fitted(
        self, name: str, place: tuple[str, str], change: Change, weight: float
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The change as its layer applies it; raises JobFailed if the checkpoint has none such."""
        layer = self._layers.get(place)
        own: Any = getattr(layer, "weight", None)
        if layer is None or own is None:
            raise JobFailed("bad_lora", f"the LoRA {name} is made for another model")
        down, up = _shaped(change, own.ndim)
        if down.shape[1:] != own.shape[1:] or up.shape[0] != own.shape[0]:
            raise JobFailed("bad_lora", f"the LoRA {name} is made for a model of another size")
        return down.to(own.device, own.dtype), up.to(own.device, own.dtype), change.scale * weight

    def _changes(self, name: str) -> Changes:
        path = None if self._folder is None else self._folder / f"{name}.safetensors"
        if path is None or not path.is_file():
            raise JobFailed("unknown_lora", f"there is no LoRA {name} on this server")
        key = (path, path.stat().st_mtime_ns)
        if key not in self._files:
            try:
                self._files[key] = read_lora(path)
            except CheckpointRefused as error:
                raise JobFailed("bad_lora", error.detail) from error
            while len(self._files) > KEPT_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(key)
        return self._files[key]


def _shaped(change: Change, dimensions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As matrices for a linear layer, as kernels for a convolution: files have either for 1 x 1."""
    down, up = change.down, change.up
    if dimensions == 2:
        return down.flatten(1), up.flatten(1)
    return down[(...,) + (None,) * (4 - down.ndim)], up[(...,) + (None,) * (4 - up.ndim)]
