"""Write an SDXL checkpoint of any width as one file in the original layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_NAMES = {
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_norm_out": "norm_out",
}


def write(path: Path, nets: dict[str, Any]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, value in nets["unet"].state_dict().items():
        tensors["model.diffusion_model." + unet_name(name)] = value
    levels = len(nets["vae"].config.down_block_types)
    for name, value in nets["vae"].state_dict().items():
        attention = re.search(r"\.attentions\.0\.to_\w+(\.0)?\.weight$", name)
        value = value[:, :, None, None] if attention else value
        tensors["first_stage_model." + vae_name(name, levels)] = value
    for name, value in nets["text_encoder"].state_dict().items():
        plain = name.removeprefix("text_model.")
        tensors["conditioner.embedders.0.transformer.text_model." + plain] = value
    for name, value in open_clip(nets["text_encoder_2"]).items():
        tensors["conditioner.embedders.1.model." + name] = value
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def unet_name(name: str) -> str:
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(ours + "."):
            return name.replace(ours, theirs, 1)
    if ".resnets." in name:
        for ours, theirs in RESNET.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    rules = (
        (r"down_blocks\.(\d)\.resnets\.(\d)", lambda i, j: f"input_blocks.{3 * i + j + 1}.0"),
        (r"down_blocks\.(\d)\.attentions\.(\d)", lambda i, j: f"input_blocks.{3 * i + j + 1}.1"),
        (
            r"down_blocks\.(\d)\.downsamplers\.(0)\.conv",
            lambda i, _: f"input_blocks.{3 * i + 3}.0.op",
        ),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda i, j: f"output_blocks.{3 * i + j}.0"),
        (r"up_blocks\.(\d)\.attentions\.(\d)", lambda i, j: f"output_blocks.{3 * i + j}.1"),
        (
            r"up_blocks\.(\d)\.upsamplers\.(0)\.conv",
            lambda i, _: f"output_blocks.{3 * i + 2}.2.conv",
        ),
        (r"(mid)_block\.resnets\.(\d)", lambda _, j: f"middle_block.{2 * j}"),
        (r"(mid)_block\.attentions\.(0)", lambda *_: "middle_block.1"),
    )
    for pattern, make in rules:
        if match := re.match(pattern, name):
            i, j = (int(g) if g.isdigit() else 0 for g in match.groups())
            return make(i, j) + name[match.end() :]
    raise AssertionError(name)


def vae_name(name: str, levels: int) -> str:
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)

    def up(match: re.Match[str]) -> str:
        return f"up.{levels - 1 - int(match[1])}."

    name = re.sub(r"up_blocks\.(\d)\.", up, name)
    name = name.replace("upsamplers.0", "upsample")
    if ".up." in name:
        name = name.replace("resnets", "block")
    for ours, theirs in VAE_NAMES.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\g<1>{theirs}.", name)
    return name


def open_clip(encoder: Any) -> dict[str, torch.Tensor]:
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
    }
    for n in range(encoder.config.num_hidden_layers):
        layer, block = f"encoder.layers.{n}.", f"transformer.resblocks.{n}."
        for end in ("weight", "bias"):
            qkv = [state[f"{layer}self_attn.{x}_proj.{end}"] for x in "qkv"]
            out[f"{block}attn.in_proj_{end}"] = torch.cat(qkv)
            for ours, theirs in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                out[f"{block}{theirs}.{end}"] = state[f"{layer}{ours}.{end}"]
    return out
