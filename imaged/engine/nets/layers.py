"""Layers of UNet and VAE. Images are (rows, channels, height, width)."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

KeysValues = tuple[torch.Tensor, torch.Tensor]
LowRank = tuple[torch.Tensor, torch.Tensor, float]  # down, up, scale: see lora.py

GUIDED_ROWS = 2  # of one guided image: without and with the prompt
MAX_PACKED_WEIGHT = 1_000_000  # numbers
MAX_PACKED_CELLS = 32 * 32  # of an image: in larger ones the conversion is short beside the call


class Layer(nn.Module):
    """A layer that computes two rows at a time if `in_pairs` is set, however many there are.

    Libraries sum some products in another order when there are more rows, and an image would
    change with its batch; in pairs of rows it cannot.
    """

    in_pairs = False
    changes: tuple[LowRank, ...] = ()  # of the LoRAs in use

    def plain(self, *rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def paired(self, *rows: torch.Tensor) -> torch.Tensor:
        starts = range(0, len(rows[0]), GUIDED_ROWS)
        return torch.cat([self.plain(*(r[at : at + GUIDED_ROWS] for r in rows)) for at in starts])

    def forward(self, *rows: torch.Tensor) -> torch.Tensor:
        """Tensors whose first dimension are the rows."""
        if self.in_pairs and len(rows[0]) > GUIDED_ROWS:
            return self.paired(*rows)
        return self.plain(*rows)


class Linear(Layer, nn.Linear):
    def plain(self, *rows: torch.Tensor) -> torch.Tensor:
        out = nn.Linear.forward(self, *rows)
        for down, up, scale in self.changes:
            out = out + scale * F.linear(F.linear(rows[0], down), up)
        return out


class Conv2d(Layer, nn.Conv2d):
    """With `packs`, its weight is stored in oneDNN's own layout, for small images on a CPU.

    Without, every call converts it, which takes a tenth of a small net's time. The bits are the
    same for two rows and more (decision 28). Set it again after the weight has changed.
    """

    _packed: torch.Tensor | None = None
    _packed_for: torch.Size | None = None

    @property
    def packs(self) -> bool:
        return self._packed_for is not None

    @packs.setter
    def packs(self, wanted: bool) -> None:
        """Has no effect on 1x1 kernels, which are matrix products, and on large weights: in large
        nets the copy would take a tenth of their memory and save nothing.
        """
        weight = self.weight
        able = self.kernel_size != (1, 1) and weight.numel() <= MAX_PACKED_WEIGHT and _packs()
        able = able and weight.device.type == "cpu" and weight.dtype == torch.float32
        self._packed, self._packed_for = None, torch.Size() if wanted and able else None

    def __getstate__(self) -> dict[str, Any]:
        """Copies do not pack: their weight may be replaced."""
        return {**self.__dict__, "_packed": None, "_packed_for": None}

    def plain(self, *rows: torch.Tensor) -> torch.Tensor:
        out = self._convolved(*rows)
        for down, up, scale in self.changes:
            h = F.conv2d(rows[0], down, None, self.stride, self.padding)
            out = out + scale * F.conv2d(h, up)
        return out

    def _convolved(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        if not self.packs or height * width > MAX_PACKED_CELLS or x.dtype != torch.float32:
            return nn.Conv2d.forward(self, x)
        assert not isinstance(self.padding, str)
        geometry = (*map(list, (self.padding, self.stride, self.dilation)), self.groups)
        operators = torch.ops.mkldnn
        if self._packed is None or self._packed_for != x.shape[2:]:  # it depends on the size
            packed = operators._reorder_convolution_weight(self.weight, *geometry, list(x.shape))
            self._packed, self._packed_for = packed, x.shape[2:]
        given: tuple[Any, ...] = (self._packed, self.bias, *geometry, "none", [], "")
        out: torch.Tensor = operators._convolution_pointwise(x, *given)
        return out


@cache
def _packs() -> bool:
    """Whether this PyTorch has the operators, which are its compiler's and not public. Only on x86,
    where they were tried.
    """
    names = ("_reorder_convolution_weight", "_convolution_pointwise")
    has = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return has and x86 and all(hasattr(torch.ops.mkldnn, name) for name in names)


class ScaledDotProduct(Layer):
    """Queries, keys and values, each (rows, heads, tokens, head width)."""

    def plain(self, *rows: torch.Tensor) -> torch.Tensor:
        queries, keys, values = rows
        return F.scaled_dot_product_attention(queries, keys, values)


class ResBlock(nn.Module):
    """Two convolutions around a shift by the time embedding, beside a shortcut.

    Source: He et al. 2015, in the form of Dhariwal and Nichol 2021.
    """

    def __init__(
        self, inputs: int, outputs: int, groups: int, eps: float, time_width: int = 0
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        if time_width:
            self.time_emb_proj = Linear(time_width, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        """`time`: (rows, outputs), the time embedding through `time_emb_proj`."""
        h: torch.Tensor = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            h = h + time[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor, size: torch.Size | None = None) -> torch.Tensor:
        """Twice as large, or of the given (height, width)."""
        wider = F.interpolate(x, size) if size else F.interpolate(x, scale_factor=2.0)
        out: torch.Tensor = self.conv(wider)
        return out


class Attention(nn.Module):
    """Multi-head attention of one sequence, (rows, tokens, width), to itself or to another."""

    def __init__(self, width: int, context: int, heads: int, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias)
        self.to_k = Linear(context, width, bias)
        self.to_v = Linear(context, width, bias)
        self.to_out = nn.ModuleList([Linear(width, width)])
        self.attend = ScaledDotProduct()

    def keys_values(self, context: torch.Tensor) -> KeysValues:
        """(rows, tokens, context) -> keys and values, each (rows, heads, tokens, head width)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: torch.Tensor, given: KeysValues | None = None) -> torch.Tensor:
        """`given`: keys and values, where they are not the sequence's own."""
        keys, values = given or self.keys_values(x)
        h = self.attend(self._split(self.to_q(x)), keys, values)
        out: torch.Tensor = self.to_out[0](h.transpose(1, 2).flatten(2))
        return out
