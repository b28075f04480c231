"""The decoder of SDXL's VAE (Kingma and Welling 2013; Rombach et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from imaged.engine.nets.layers import Attention, KeysValues, ResBlock, Upsample
from imaged.engine.nets.net import Config, Net

EPS = 1e-6


@dataclass(frozen=True)
class VAEConfig(Config):
    """config.json of a VAE. A latent times `scaling_factor` has about unit variance."""

    FIXED: ClassVar[dict[str, Any]] = {
        "act_fn": "silu",
        "out_channels": 3,
        "shift_factor": None,
        "use_post_quant_conv": True,
    }

    block_out_channels: tuple[int, ...]
    latent_channels: int = 4
    layers_per_block: int = 1
    mid_block_add_attention: bool = True
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None


class CellAttention(Attention):
    """Attention of one head among the cells, beside a shortcut."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__(width, width, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, width, EPS)

    def forward(self, x: torch.Tensor, given: KeysValues | None = None) -> torch.Tensor:
        """(rows, width, h, w) -> the same shape."""
        cells = super().forward(self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2), given)
        return x + cells.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


class Level(nn.Module):
    """Residual blocks of one resolution; then twice as large, unless it is the last."""

    def __init__(self, inputs: int, width: int, blocks: int, groups: int, last: bool) -> None:
        super().__init__()
        counts = (inputs, *[width] * (blocks - 1))
        self.resnets = nn.ModuleList(ResBlock(count, width, groups, EPS) for count in counts)
        self.upsamplers = nn.ModuleList(map(Upsample, [] if last else [width]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Middle(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nn.ModuleList(ResBlock(width, width, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList()
        if config.mid_block_add_attention:
            self.attentions.append(CellAttention(width, groups))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        out: torch.Tensor = self.resnets[1](x)
        return out


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        width, blocks = widths[0], config.layers_per_block + 1
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList()
        for n, after in enumerate(widths, start=1):
            self.up_blocks.append(Level(width, after, blocks, groups, last=n == len(widths)))
            width = after
        self.conv_norm_out = nn.GroupNorm(groups, width, EPS)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        out: torch.Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class VAE(Net):
    """Latents to pictures; the encoder's weights stay in the file."""

    IGNORED = ("encoder.", "quant_conv.")
    config: VAEConfig

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """(rows, latent channels, h, w), unscaled -> RGB in about -1..1 (rows, 3, 8 h, 8 w)."""
        out: torch.Tensor = self.decoder(self.post_quant_conv(z))
        return out
