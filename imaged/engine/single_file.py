"""One safetensors file in the original SDXL layout to diffusers and transformers nets.

The file has no configs. What differs between SDXL checkpoints of any width is read off the
tensors' shapes; what never differs is written here. Renaming the keys is diffusers' own code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from imaged.errors import CheckpointRefused

Tensors = Mapping[str, torch.Tensor]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = (
    "conditioner.embedders.0.transformer.text_model.",
    "conditioner.embedders.1.model.",
)
NOT_EPSILON = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max")  # marks in files
HEAD = 64  # width of one attention head, in the UNet and in both text encoders


def load_single_file(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """unet, vae, text_encoder and text_encoder_2 of a file; raises CheckpointRefused."""
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get("modelspec.prediction_type", "epsilon")
    except SafetensorError as error:
        raise CheckpointRefused(
            f"{path.name} is not a safetensors file; other formats can run code and are refused"
        ) from error
    marks = [key for key in NOT_EPSILON if key in tensors]
    if marks or said.lower() not in ("epsilon", "eps"):
        raise CheckpointRefused(
            f"{path.name} does not predict noise ({marks[0] if marks else said}): v-prediction and "
            "EDM files are not served; a v-prediction model in a diffusers folder is"
        )
    for prefix, what in (
        (UNET, "a UNet"),
        (VAE, "a VAE"),
        (CLIP, "the first text encoder"),
        (OPEN_CLIP, "the second text encoder"),
    ):
        if not any(key.startswith(prefix) for key in tensors):
            raise CheckpointRefused(
                f"{path.name} is not an SDXL checkpoint: there is not {what} at {prefix}*"
            )
    nets = {
        "unet": _unet(tensors),
        "vae": _vae(tensors),
        "text_encoder": _clip(tensors),
        "text_encoder_2": _open_clip(tensors),
    }
    return {name: net.to(dtype) for name, net in nets.items()}


def _count(tensors: Tensors, pattern: str) -> int:
    """How many different numbers stand in the pattern's group."""
    found = (re.match(pattern, key) for key in tensors)
    return len({match[1] for match in found if match})


def _unet(tensors: Tensors) -> Any:
    def shape(name: str) -> torch.Size:
        return tensors[UNET + name].shape

    widths = tuple(shape(f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in (1, 4, 7))
    depths = tuple(
        _count(tensors, rf"{re.escape(UNET)}input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.")
        for i in (1, 4, 7)
    )
    context = shape("input_blocks.7.1.transformer_blocks.0.attn2.to_k.weight")[1]
    pooled = tensors[OPEN_CLIP + "text_projection"].shape[1]
    conditions = shape("label_emb.0.0.weight")[1]
    config = dict(
        sample_size=128,
        in_channels=shape("input_blocks.0.0.weight")[1],
        out_channels=shape("out.2.weight")[0],
        down_block_types=_blocks("DownBlock2D", "CrossAttnDownBlock2D", depths),
        up_block_types=_blocks("UpBlock2D", "CrossAttnUpBlock2D", depths[::-1]),
        block_out_channels=widths,
        layers_per_block=2,
        transformer_layers_per_block=tuple(max(d, 1) for d in depths),
        attention_head_dim=tuple(w // HEAD for w in widths),
        cross_attention_dim=context,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=(conditions - pooled) // 6,
        projection_class_embeddings_input_dim=conditions,
    )
    renamed = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), config)
    return _filled(UNet2DConditionModel, config, renamed)


def _blocks(plain: str, crossed: str, depths: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(crossed if depth else plain for depth in depths)


def _vae(tensors: Tensors) -> Any:
    levels = _count(tensors, rf"{re.escape(VAE)}encoder\.down\.(\d+)\.")
    widths = tuple(
        tensors[f"{VAE}encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)
    )
    config = dict(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=_count(tensors, rf"{re.escape(VAE)}encoder\.down\.0\.block\.(\d+)\."),
        latent_channels=tensors[VAE + "post_quant_conv.weight"].shape[0],
        sample_size=1024,
        scaling_factor=0.13025,
    )
    renamed = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), config)
    return _filled(AutoencoderKL, config, renamed)


def _text_config(width: int, layers: int, mlp: int, act: str, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        num_attention_heads=max(1, width // HEAD),
        hidden_act=act,
        projection_dim=projection,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
    )


def _clip(tensors: Tensors) -> Any:
    width = tensors[CLIP + "embeddings.token_embedding.weight"].shape[1]
    layers = _count(tensors, rf"{re.escape(CLIP)}encoder\.layers\.(\d+)\.")
    mlp = tensors[CLIP + "encoder.layers.0.mlp.fc1.weight"].shape[0]
    config = _text_config(width, layers, mlp, "quick_gelu", width)
    renamed = single_file_utils.convert_ldm_clip_checkpoint(
        {k: v for k, v in tensors.items() if k.startswith(CLIP)}
    )
    return _filled_text(CLIPTextModel, config, renamed)


def _open_clip(tensors: Tensors) -> Any:
    width = tensors[OPEN_CLIP + "token_embedding.weight"].shape[1]
    layers = _count(tensors, rf"{re.escape(OPEN_CLIP)}transformer\.resblocks\.(\d+)\.")
    mlp = tensors[OPEN_CLIP + "transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    projection = tensors[OPEN_CLIP + "text_projection"].shape[1]
    config = _text_config(width, layers, mlp, "gelu", projection)
    renamed = single_file_utils.convert_open_clip_checkpoint(
        SimpleNamespace(config=config), dict(tensors), prefix=OPEN_CLIP
    )
    return _filled_text(CLIPTextModelWithProjection, config, renamed)


def _filled(cls: Any, config: dict[str, Any], tensors: Tensors) -> Any:
    with torch.device("meta"):
        net = cls(**config)
    net.load_state_dict(tensors, strict=True, assign=True)
    return net


def _filled_text(cls: Any, config: CLIPTextConfig, tensors: Tensors) -> Any:
    net = cls(config)  # not on meta: the position ids are not in the file
    wanted = net.state_dict()
    if not hasattr(net, "text_model"):
        tensors = {key.removeprefix("text_model."): value for key, value in tensors.items()}
    net.load_state_dict({k: v for k, v in tensors.items() if k in wanted}, strict=True, assign=True)
    return net
