"""SDXL's UNet (Podell et al. 2023).

Cross-attention keys and values and the time embeddings are inputs and not computed here: they
depend on prompt and timestep alone, not on the call (imaged/engine/nets/cached_unet.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from imaged.engine.nets.layers import (
    Attention,
    Conv2d,
    Downsample,
    KeysValues,
    Linear,
    ResBlock,
    Upsample,
)
from imaged.engine.nets.net import Config, Net
from imaged.errors import CheckpointRefused


@dataclass(frozen=True)
class UNetConfig(Config):
    """config.json of a UNet. `attention_head_dim` is that file's name for numbers of heads."""

    FIXED: ClassVar[dict[str, Any]] = {
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "attention_type": "default",
        "center_input_sample": False,
        "class_embed_type": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "reverse_transformer_layers_per_block": None,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
        "use_linear_projection": True,
    }

    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    cross_attention_dim: int
    addition_time_embed_dim: int
    projection_class_embeddings_input_dim: int
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        kinds = tuple(name.removesuffix("DownBlock2D") for name in self.down_block_types)
        mirrored = tuple(name.removesuffix("UpBlock2D") for name in self.up_block_types[::-1])
        if not set(kinds) <= {"", "CrossAttn"} or kinds != mirrored:
            raise CheckpointRefused(f"it has other blocks than SDXL's: {self.down_block_types}")
        if len(kinds) != len(self.block_out_channels):
            raise CheckpointRefused("it has not as many block_out_channels as blocks")

    def depths(self) -> tuple[int, ...]:
        """Transformer blocks after each residual block of a level; 0 where there are none."""
        crossed = [name.startswith("CrossAttn") for name in self.down_block_types]
        pairs = zip(self._each(self.transformer_layers_per_block), crossed, strict=True)
        return tuple(depth if cross else 0 for depth, cross in pairs)

    def mid_depth(self) -> int:
        return self._each(self.transformer_layers_per_block)[-1]

    def heads(self) -> tuple[int, ...]:
        return self._each(self.attention_head_dim)

    def _each(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        """One value for each level."""
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


class GEGLU(nn.Module):
    """Shazeer 2020: one half of a projection, gated by the other."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: torch.Tensor = value * F.gelu(gate)
        return out


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # Identity stands for training's dropout, so that the parameters' names agree.
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


class TransformerBlock(nn.Module):
    """Self-attention among the cells, cross-attention to the prompt, feed forward; all residual."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: torch.Tensor, text: KeysValues) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        out: torch.Tensor = x + self.ff(self.norm3(x))
        return out


class Transformer(nn.Module):
    """Transformer blocks over the cells of a picture."""

    def __init__(self, width: int, heads: int, context: int, depth: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = Linear(width, width)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, context) for _ in range(depth)
        )
        self.proj_out = Linear(width, width)

    def forward(self, x: torch.Tensor, texts: Iterator[KeysValues]) -> torch.Tensor:
        h = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        for block in self.transformer_blocks:
            h = block(h, next(texts))
        out: torch.Tensor = self.proj_out(h).view(len(x), *x.shape[2:], -1)
        return x + out.permute(0, 3, 1, 2)


class Level(nn.Module):
    """One resolution on the way down or up, or the middle.

    inputs: channels that come to each residual block, those of a skip among them.
    depth:  transformer blocks after each of the first `crossed` residual blocks.
    """

    def __init__(
        self, config: UNetConfig, at: int, inputs: Sequence[int], depth: int, crossed: int
    ) -> None:
        super().__init__()
        width, groups = config.block_out_channels[at], config.norm_num_groups
        self.attentions = nn.ModuleList(
            Transformer(width, config.heads()[at], config.cross_attention_dim, depth, groups)
            for _ in range(crossed if depth else 0)
        )
        time = 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResBlock(count, width, groups, config.norm_eps, time) for count in inputs
        )

    def step(
        self, at: int, x: torch.Tensor, times: Iterator[torch.Tensor], texts: Iterator[KeysValues]
    ) -> torch.Tensor:
        """Residual block number `at` and the transformer after it, if there is one."""
        x = self.resnets[at](x, next(times))
        return self.attentions[at](x, texts) if at < len(self.attentions) else x


class Down(Level):
    def __init__(self, config: UNetConfig, at: int, inputs: Sequence[int], last: bool) -> None:
        super().__init__(config, at, inputs, config.depths()[at], len(inputs))
        widths = [] if last else [config.block_out_channels[at]]
        self.downsamplers = nn.ModuleList(map(Downsample, widths))

    def forward(
        self, skips: list[torch.Tensor], times: Iterator[torch.Tensor], texts: Iterator[KeysValues]
    ) -> None:
        """Goes on from the last of `skips` and appends what the way up will read."""
        for at in range(len(self.resnets)):
            skips.append(self.step(at, skips[-1], times, texts))
        for downsample in self.downsamplers:
            skips.append(downsample(skips[-1]))


class Middle(Level):
    def __init__(self, config: UNetConfig) -> None:
        at = len(config.block_out_channels) - 1
        width = config.block_out_channels[at]
        super().__init__(config, at, [width, width], config.mid_depth(), 1)

    def forward(
        self, x: torch.Tensor, times: Iterator[torch.Tensor], texts: Iterator[KeysValues]
    ) -> torch.Tensor:
        return self.step(1, self.step(0, x, times, texts), times, texts)


class Up(Level):
    def __init__(self, config: UNetConfig, at: int, inputs: Sequence[int]) -> None:
        super().__init__(config, at, inputs, config.depths()[at], len(inputs))
        widths = [config.block_out_channels[at]] if at else []
        self.upsamplers = nn.ModuleList(map(Upsample, widths))

    def forward(
        self,
        x: torch.Tensor,
        skips: list[torch.Tensor],
        times: Iterator[torch.Tensor],
        texts: Iterator[KeysValues],
    ) -> torch.Tensor:
        for at in range(len(self.resnets)):
            x = self.step(at, torch.cat([x, skips.pop()], dim=1), times, texts)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])  # odd sides were rounded up on the way down
        return x


class Embedding(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, width)
        self.linear_2 = Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class UNetModel(Net):
    """Latents, time embeddings and texts -> the model's output. Modules are in order of use."""

    config: UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, layers = config.block_out_channels, config.layers_per_block
        last = len(widths) - 1
        self.time_embedding = Embedding(widths[0], 4 * widths[0])
        self.add_embedding = Embedding(config.projection_class_embeddings_input_dim, 4 * widths[0])
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks, skips, width = nn.ModuleList(), [widths[0]], widths[0]
        for at in range(len(widths)):
            inputs = [width, *[widths[at]] * (layers - 1)]
            self.down_blocks.append(Down(config, at, inputs, last=at == last))
            width = widths[at]
            skips += [width] * (layers + (at < last))
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList()
        for at in reversed(range(len(widths))):
            inputs = [n + skips.pop() for n in (width, *[widths[at]] * layers)]
            self.up_blocks.append(Up(config, at, inputs))
            width = widths[at]
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)

    def resnets(self) -> list[ResBlock]:
        return [m for m in self.modules() if isinstance(m, ResBlock)]

    def cross_attentions(self) -> list[Attention]:
        return [m.attn2 for m in self.modules() if isinstance(m, TransformerBlock)]

    def embed(
        self, timesteps: torch.Tensor, pooled: torch.Tensor, sizes: torch.Tensor
    ) -> torch.Tensor:
        """(N,) timesteps, (pooled width,) text and (6,) sizes -> (N, 4 first width) embeddings."""
        width = self.config.block_out_channels[0]
        time = self.time_embedding(sinusoidal(timesteps, width).to(self.dtype))
        told = sinusoidal(sizes, self.config.addition_time_embed_dim).flatten().to(self.dtype)
        out: torch.Tensor = time + self.add_embedding(torch.cat([pooled, told])[None])
        return F.silu(out)

    def forward(
        self, x: torch.Tensor, times: Iterator[torch.Tensor], texts: Iterator[KeysValues]
    ) -> torch.Tensor:
        """x (rows, channels, h, w) -> output of the same shape.

        times: for each of `resnets()` (rows, its width), its projection of the embedding.
        texts: for each of `cross_attentions()` the keys and values of each row's text.
        """
        skips = [self.conv_in(x)]
        for level in self.down_blocks:
            level(skips, times, texts)
        x = self.mid_block(skips[-1], times, texts)
        for level in self.up_blocks:
            x = level(x, skips, times, texts)
        out: torch.Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


def sinusoidal(values: torch.Tensor, width: int) -> torch.Tensor:
    """(N,) -> (N, width): cosines, then sines, of wavelengths from 2 pi to 20,000 pi.

    Source: Vaswani et al. 2017, with the cosines first.
    """
    half = torch.arange(width // 2, dtype=torch.float32, device=values.device)
    angles = values.float()[:, None] * torch.exp(-math.log(10_000) * half / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)
