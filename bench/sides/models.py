"""SDXL checkpoints of random weights: two in small for the CPU, one of full size for a GPU.

All have SDXL's classes, files and block layout. `thin` is so small that a UNet call is bound
by what surrounds the arithmetic, `wide` is bound by the arithmetic. Their VAEs shrink pictures by
32 and 16, so that the API's smallest picture of 512 px is a latent of 16 or 32 cells a side.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from bench import app
from bench.app import main
from imaged.catalogue.model import MICRO

SEED = 20
PIXELS = 512  # a side, in every benchmark of the small ones


@dataclass(frozen=True)
class Text:
    """One CLIP text encoder."""

    width: int
    layers: int
    heads: int
    act: str
    pooled: int

    def config(self) -> Any:
        from transformers import CLIPTextConfig

        return CLIPTextConfig(
            vocab_size=49408,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            hidden_act=self.act,
            projection_dim=self.pooled,
            max_position_embeddings=77,
            bos_token_id=49406,
            eos_token_id=49407,
        )


@dataclass(frozen=True)
class Shape:
    """The numbers in which SDXL checkpoints differ."""

    channels: tuple[int, int, int]
    depth: tuple[int, int, int]  # transformer blocks at each level
    heads: tuple[int, int, int]
    groups: int
    time_width: int
    latent: int  # cells a side of the pipeline's default picture
    vae_channels: tuple[int, ...]
    vae_layers: int
    vae_groups: int
    texts: tuple[Text, Text]

    def unet(self) -> dict[str, Any]:
        pooled = self.texts[1].pooled
        return dict(
            sample_size=self.latent,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=self.channels,
            layers_per_block=2,
            transformer_layers_per_block=self.depth,
            attention_head_dim=self.heads,  # the library's name for the number of heads
            cross_attention_dim=sum(text.width for text in self.texts),
            norm_num_groups=self.groups,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=self.time_width,
            projection_class_embeddings_input_dim=pooled + 6 * self.time_width,
        )

    def nets(self) -> dict[str, Any]:
        """The reference libraries' nets, drawn anew."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        first, second = self.texts
        return {
            "unet": UNet2DConditionModel(**self.unet()),
            "vae": AutoencoderKL(**self.vae()),
            "text_encoder": CLIPTextModel(first.config()),
            "text_encoder_2": CLIPTextModelWithProjection(second.config()),
        }

    def vae(self) -> dict[str, Any]:
        levels = len(self.vae_channels)
        return dict(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=self.vae_channels,
            layers_per_block=self.vae_layers,
            latent_channels=4,
            norm_num_groups=self.vae_groups,
            sample_size=self.latent * 2 ** (levels - 1),
            scaling_factor=0.13025,
            mid_block_add_attention=self.vae_layers > 1,
            force_upcast=self.vae_layers > 1,
        )


def _sdxl(
    channels: tuple[int, int, int],
    depth: tuple[int, int, int],
    heads: tuple[int, int, int],
    vae_channels: tuple[int, ...],
    texts: tuple[Text, Text],
) -> Shape:
    """SDXL's own blocks and VAE, of any width."""
    return Shape(channels, depth, heads, 32, 256, 128, vae_channels, 2, 32, texts)


_SMALL_TEXTS = (Text(32, 3, 2, "quick_gelu", 64), Text(32, 3, 2, "gelu", 64))
SHAPES = {
    "thin": Shape(
        (16, 32, 64), (1, 1, 2), (1, 1, 2), 8, 32, 16, (4, 4, 4, 8, 8, 16), 0, 4, _SMALL_TEXTS
    ),
    "wide": Shape(
        (64, 128, 256), (1, 2, 2), (1, 2, 4), 32, 32, 32, (4, 4, 8, 8, 16), 0, 4, _SMALL_TEXTS
    ),
    "reduced": _sdxl(
        (64, 128, 128),
        (1, 1, 2),
        (1, 2, 2),
        (32, 32, 64, 64),
        (Text(64, 2, 1, "quick_gelu", 64), Text(128, 2, 2, "gelu", 128)),
    ),
    "full": _sdxl(
        (320, 640, 1280),
        (1, 2, 10),
        (5, 10, 20),
        (128, 256, 512, 512),
        (Text(768, 12, 12, "quick_gelu", 768), Text(1280, 32, 20, "gelu", 1280)),
    ),
}


def checkpoint(name: str, device: str = "cpu") -> Path:
    """The folder of a checkpoint of this shape, made at first use."""
    folder = app.BUILD / "checkpoints" / name
    if not (folder / "model_index.json").exists():
        build(SHAPES[name], folder, device)
    return folder


def build(shape: Shape, folder: Path, device: str = "cpu") -> None:
    """Draw the weights on the device and save a diffusers folder; half size where it is large."""
    torch.manual_seed(SEED)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if device == "cpu" and shape is SHAPES["full"]:
        dtype = torch.float16
    with torch.device(device):
        nets = shape.nets()
    with torch.no_grad():
        nets["vae"].decoder.conv_out.weight *= 1.5  # else grey in grey, where all pictures agree
    for part, net in nets.items():
        if net.dtype != dtype:
            net.to(dtype)
        net.save_pretrained(folder / part)
    for part in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(MICRO / part, folder / part, dirs_exist_ok=True)
    shutil.copy(MICRO / "model_index.json", folder)  # last: it says that all is there


@main.command()
def models() -> None:
    """Make the two small checkpoints, and one picture of each to see that they are whole.

    The other commands make what they need themselves.
    """
    from imaged.engine.engine import Engine
    from imaged.engine.loading.load import load
    from imaged.params.image_params import ImageParams

    for name in ("thin", "wide"):
        folder = checkpoint(name)
        nets = load(folder, torch.device("cpu"))
        engine = Engine(nets)
        engine.submit(name, ImageParams("a lake", seed=1, img_width=PIXELS, img_height=PIXELS))
        while not (outcomes := engine.tick()):
            pass
        if outcomes[0].error is not None:
            raise click.ClickException(f"{name}: {outcomes[0].error}")
        levels = torch.frombuffer(bytearray(outcomes[0].pictures[0].rgb), dtype=torch.uint8).float()
        parameters = sum(p.numel() for p in nets.unet.parameters())
        click.echo(
            f"{name}: UNet of {parameters / 1e6:.1f} M parameters, picture of {PIXELS} px with "
            f"levels {levels.mean():.0f} +- {levels.std():.0f}; {folder}"
        )
