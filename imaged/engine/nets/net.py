"""Shared by all nets: checked configs, and weights checked for completeness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, ClassVar, Self

import torch
from torch import nn

from imaged.errors import CheckpointRefused

Tensors = Mapping[str, torch.Tensor]


class Config:
    """Base of the dataclasses that hold what a net's config.json says.

    FIXED: values that are the same in every SDXL checkpoint; a file that says another is refused.
    """

    FIXED: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> Self:
        """The fields out of a config.json; raises CheckpointRefused for a net of another kind."""
        for name, value in cls.FIXED.items():
            if said.get(name, value) != value:
                raise CheckpointRefused(f"{name} is {said[name]!r}; SDXL's is {value!r}")
        kept: dict[str, Any] = {}
        for field in fields(cls):  # type: ignore[arg-type]
            value = said.get(field.name)
            if value is not None:
                kept[field.name] = tuple(value) if isinstance(value, list) else value
            elif field.default is MISSING:
                raise CheckpointRefused(f"its config has no {field.name}")
        return cls(**kept)


class Net(nn.Module):
    """A net whose weights come from a file."""

    config: Any
    IGNORED: tuple[str, ...] = ()  # prefixes of tensors in files that this net does not use

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @classmethod
    def build(
        cls,
        config: Any,
        tensors: Tensors,
        device: torch.device,
        dtype: torch.dtype,
        done: Callable[[int], Any] = lambda _: None,
    ) -> Self:
        """The net with these weights; raises CheckpointRefused unless each has its tensor.

        done: called with the bytes of each tensor that was loaded.
        """
        with torch.device("meta"):
            net = cls(config)
        wanted = net.state_dict()
        spare = [key for key in tensors if key not in wanted and not key.startswith(cls.IGNORED)]
        absent = [key for key in wanted if key not in tensors]
        for what, keys in (("lacks", absent), ("does not know", spare)):
            if keys:
                raise CheckpointRefused(f"it {what} {len(keys)} weights, {min(keys)} among them")
        for key, meant in wanted.items():
            if tensors[key].shape != meant.shape:
                raise CheckpointRefused(
                    f"{key} has the shape {tuple(tensors[key].shape)}, not {tuple(meant.shape)}"
                )
        weights = {}
        for key in wanted:
            weights[key] = tensors[key].to(device, dtype, copy=True)  # not the file's
            done(tensors[key].nbytes)
        net.load_state_dict(weights, assign=True)
        return net.eval().requires_grad_(False)
