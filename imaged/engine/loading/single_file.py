"""One safetensors file in the original SDXL layout to configs and tensors of a diffusers folder.

The file has no configs. What differs between SDXL checkpoints of any width is read off the
tensors' shapes; what never differs is written here. The tensors stay views of the mapped file:
nothing is read before it is used, and of the whole only one small matrix is copied. A VAE may
lie in a file of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from imaged.errors import CheckpointRefused
from imaged.weight_files import Header

Tensors = Mapping[str, torch.Tensor]
Net = tuple[Mapping[str, Any], Tensors]  # as config.json and *.safetensors hold it

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = (
    "conditioner.embedders.0.transformer.text_model.",
    "conditioner.embedders.1.model.",
)
PARTS = {
    "unet": (UNET, "a UNet"),
    "vae": (VAE, "a VAE"),
    "text_encoder": (CLIP, "the first text encoder"),
    "text_encoder_2": (OPEN_CLIP, "the second text encoder"),
}
NOT_WEIGHTS = ("position_ids", "attn_mask", "logit_scale")  # buffers that some files hold
HEAD_WIDTH = 64  # width of one attention head, in the UNet and in both text encoders
VAE_KEPT = ("decoder.", "post_quant_conv.")  # no picture is ever encoded
BLOCKS_PER_LEVEL = 3  # of the UNet's numbered blocks make a level: down two and a halving, up three

UNET_ENDS = {
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "label_emb.0.0.": "add_embedding.linear_1.",
    "label_emb.0.2.": "add_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
}
UNET_RESNET = {
    "in_layers.0.": "norm1.",
    "in_layers.2.": "conv1.",
    "emb_layers.1.": "time_emb_proj.",
    "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.",
    "skip_connection.": "conv_shortcut.",
}
DECODER_ENDS = {
    "decoder.norm_out.": "decoder.conv_norm_out.",
    "decoder.mid.block_1.": "decoder.mid_block.resnets.0.",
    "decoder.mid.block_2.": "decoder.mid_block.resnets.1.",
    "decoder.mid.attn_1.norm.": "decoder.mid_block.attentions.0.group_norm.",
    "decoder.mid.attn_1.q.": "decoder.mid_block.attentions.0.to_q.",
    "decoder.mid.attn_1.k.": "decoder.mid_block.attentions.0.to_k.",
    "decoder.mid.attn_1.v.": "decoder.mid_block.attentions.0.to_v.",
    "decoder.mid.attn_1.proj_out.": "decoder.mid_block.attentions.0.to_out.0.",
}
CLIP_ENDS = {
    name: f"text_model.{name}" for name in ("embeddings.", "encoder.layers.", "final_layer_norm.")
}
OPEN_CLIP_ENDS = {
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
}
OPEN_CLIP_LAYER = {
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def read_single_file(path: Path, vae: Net | None = None) -> dict[str, Net]:
    """Config and tensors of unet, vae (without its encoder), text_encoder and text_encoder_2.
    vae: replaces the file's own.

    Raises CheckpointRefused. Whether a net's tensors are complete is checked when it is built.
    """
    header = Header.read(path)
    header.refuse_others()
    readers: dict[str, Callable[[Tensors], Net]] = {
        "vae": _vae,
        "text_encoder": _clip,
        "text_encoder_2": _open_clip,
    }
    wanted = [name for name in PARTS if vae is None or name != "vae"]
    parts = {name: _tensors(header, _within(header, name), PARTS[name][0]) for name in wanted}
    with _shaped(path):
        pooled = parts["text_encoder_2"]["text_projection"].shape[1]
        nets = {"unet": _unet(parts.pop("unet"), pooled)}
        nets |= {name: readers[name](tensors) for name, tensors in parts.items()}
    return nets | ({"vae": vae} if vae else {})


def read_vae(path: Path) -> Net:
    """A VAE in a file of its own, in the original layout or with diffusers' names."""
    header = Header.read(path)
    prefix = VAE if any(key.startswith(VAE) for key in header.shapes) else ""
    kept = tuple(prefix + part for part in VAE_KEPT)
    keys = [key for key in header.shapes if key.startswith(kept)]
    if not keys:
        raise CheckpointRefused(f"{path.name} holds no VAE (decoder.* and post_quant_conv.*)")
    tensors = _tensors(header, keys, prefix)
    with _shaped(path):
        if any(key.startswith("decoder.up_blocks.") for key in tensors):
            return _vae_config(tensors), tensors
        return _vae(tensors)


@contextmanager
def _shaped(path: Path) -> Iterator[None]:
    """Turn errors about missing tensors and wrong shapes into CheckpointRefused."""
    try:
        yield
    except KeyError as error:
        raise CheckpointRefused(
            f"{path.name} is not an SDXL checkpoint: there is no {error.args[0]}"
        ) from error
    except (IndexError, ValueError) as error:
        raise CheckpointRefused(f"{path.name} is not an SDXL checkpoint: {error}") from error


def _within(header: Header, name: str) -> list[str]:
    """The names of one part's tensors in the file."""
    prefix, what = PARTS[name]
    found = sorted(key for key in header.shapes if key.startswith(prefix))
    if not found:
        hint = "; one can be given along with it: --vae FILE" if name == "vae" else ""
        raise CheckpointRefused(
            f"{header.path.name} is not a whole SDXL checkpoint: there is not {what} at "
            f"{prefix}*{hint}"
        )
    return found


def _tensors(header: Header, keys: list[str], prefix: str) -> dict[str, torch.Tensor]:
    """The part's tensors by their names without the prefix; nothing else that the file holds."""
    header.refuse_odd_types(key for key in keys if not key.endswith(NOT_WEIGHTS))
    with safe_open(header.path, framework="pt") as file:
        return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}


def _count(tensors: Tensors, pattern: str) -> int:
    """How many different numbers the pattern's group has among the names."""
    found = (re.match(pattern, key) for key in tensors)
    return len({match[1] for match in found if match})


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    """The name with its beginning exchanged; None if it begins like none of the names."""
    return next(
        (new + name[len(old) :] for old, new in names.items() if name.startswith(old)), None
    )


# -- the UNet -------------------------------------------------------------------------------------


def _unet(tensors: Tensors, pooled: int) -> Net:
    """pooled: width of the second encoder's pooled output, which is concatenated with six embedded
    sizes.
    """

    def shape(name: str) -> torch.Size:
        return tensors[name].shape

    widths = [shape(f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in (1, 4, 7)]
    depths = [
        _count(tensors, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.") for i in (1, 4, 7)
    ]
    conditions = shape("label_emb.0.0.weight")[1]
    config = dict(
        sample_size=128,
        in_channels=shape("input_blocks.0.0.weight")[1],
        out_channels=shape("out.2.weight")[0],
        down_block_types=_blocks("DownBlock2D", "CrossAttnDownBlock2D", depths),
        up_block_types=_blocks("UpBlock2D", "CrossAttnUpBlock2D", depths[::-1]),
        block_out_channels=widths,
        layers_per_block=BLOCKS_PER_LEVEL - 1,
        transformer_layers_per_block=[max(depth, 1) for depth in depths],
        attention_head_dim=[width // HEAD_WIDTH for width in widths],
        cross_attention_dim=shape("input_blocks.7.1.transformer_blocks.0.attn2.to_k.weight")[1],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=(conditions - pooled) // 6,
        projection_class_embeddings_input_dim=conditions,
    )
    named = ((_unet_name(key), value) for key, value in tensors.items())
    return config, {name: value for name, value in named if name}


def _blocks(plain: str, crossed: str, depths: list[int]) -> list[str]:
    return [crossed if depth else plain for depth in depths]


def _unet_name(name: str) -> str | None:
    """The diffusers name of a tensor, None if it is not the UNet's.

    An unknown one within it keeps its name, and is refused when the net is built.
    """
    if end := _renamed(name, UNET_ENDS):
        return end
    match = re.match(r"(input|middle|output)_blocks?\.(\d+)\.(.+)", name)
    if not match:
        return None
    side, number, rest = match[1], int(match[2]), match[3]
    if side == "middle":
        return f"mid_block.{_layer(number % 2, number // 2, rest)}"
    down = side == "input"
    level, place = divmod(number - 1 if down else number, BLOCKS_PER_LEVEL)
    block = f"{'down' if down else 'up'}_blocks.{level}."
    if resize := re.match(r"0\.op\." if down else r"[12]\.conv\.", rest):
        return f"{block}{'downsamplers' if down else 'upsamplers'}.0.conv.{rest[resize.end() :]}"
    kind, _, rest = rest.partition(".")
    return block + _layer(int(kind), place, rest) if kind in ("0", "1") else name


def diffusers_name(name: str) -> str:
    """A layer of the original layout, with underscores for points, as diffusers names it, likewise
    with underscores; any other name as it is.
    """
    pointed = re.sub(r"^(input|output)_blocks_(\d+)_(\d+)(_|$)", r"\1_blocks.\2.\3.", name)
    pointed = re.sub(r"^middle_block_(\d)_", r"middle_block.\1.", pointed)
    pointed = re.sub(r"^(time_embed|out|label_emb_0)_(\d)$", r"\1.\2", pointed)
    pointed = re.sub(r"((in|out|emb)_layers)_(\d)$", r"\1.\3", pointed)
    pointed = pointed.replace("label_emb_0.", "label_emb.0.").rstrip(".") + "."
    return (_unet_name(pointed) or name).rstrip(".").replace(".", "_")


def _layer(kind: int, place: int, rest: str) -> str:
    """A residual block's tensor (kind 0) or a transformer's, whose inner names are the same."""
    if kind == 0:
        return f"resnets.{place}.{_renamed(rest, UNET_RESNET) or rest}"
    return f"attentions.{place}.{rest}"


# -- the VAE --------------------------------------------------------------------------------------


def _vae(tensors: Tensors) -> Net:
    levels = _count(tensors, r"decoder\.up\.(\d+)\.")
    named = ((_vae_name(key, levels), value) for key, value in tensors.items())
    renamed = {name: _linear(name, value) for name, value in named if name}
    return _vae_config(renamed), renamed


def _vae_config(tensors: Tensors) -> dict[str, Any]:
    """The config of a VAE whose tensors have diffusers' names."""
    levels = _count(tensors, r"decoder\.up_blocks\.(\d+)\.")
    widths = [
        tensors[f"decoder.up_blocks.{i}.resnets.0.conv2.weight"].shape[0] for i in range(levels)
    ]
    return dict(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=widths[::-1],
        # The decoder's levels have one residual block more than the encoder's, which are counted.
        layers_per_block=_count(tensors, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1,
        latent_channels=tensors["post_quant_conv.weight"].shape[0],
        sample_size=1024,
        scaling_factor=0.13025,
    )


def _vae_name(name: str, levels: int) -> str | None:
    """The file numbers levels from the picture to the latent, diffusers the other way round.

    None for the encoder's: no picture is ever encoded.
    """
    if match := re.match(r"decoder\.up\.(\d+)\.(block\.\d+|upsample)\.", name):
        inner = match[2].replace("block", "resnets").replace("upsample", "upsamplers.0")
        new = f"decoder.up_blocks.{levels - 1 - int(match[1])}.{inner}.{name[match.end() :]}"
    else:
        new = _renamed(name, DECODER_ENDS) or name
    new = new.replace(".nin_shortcut.", ".conv_shortcut.")
    return new if new.startswith(VAE_KEPT) else None


def _linear(name: str, value: torch.Tensor) -> torch.Tensor:
    """Attention's projections are convolutions of 1x1 in the file: (out, in, 1, 1)."""
    return value.flatten(1) if ".attentions." in name and value.ndim > 2 else value


# -- the text encoders ----------------------------------------------------------------------------


def _text_config(width: int, layers: int, mlp: int, act: str, projection: int) -> dict[str, Any]:
    return dict(
        vocab_size=49408,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        num_attention_heads=max(1, width // HEAD_WIDTH),
        hidden_act=act,
        projection_dim=projection,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
    )


def _clip(tensors: Tensors) -> Net:
    width = tensors["embeddings.token_embedding.weight"].shape[1]
    layers = _count(tensors, r"encoder\.layers\.(\d+)\.")
    mlp = tensors["encoder.layers.0.mlp.fc1.weight"].shape[0]
    named = ((_renamed(key, CLIP_ENDS), value) for key, value in tensors.items())
    kept = {name: value for name, value in named if name and not name.endswith("position_ids")}
    return _text_config(width, layers, mlp, "quick_gelu", width), kept


def _open_clip(tensors: Tensors) -> Net:
    width = tensors["token_embedding.weight"].shape[1]
    layers = _count(tensors, r"transformer\.resblocks\.(\d+)\.")
    mlp = tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    projection = tensors["text_projection"].shape[1]
    config = _text_config(width, layers, mlp, "gelu", projection)
    renamed: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        if match := re.match(r"transformer\.resblocks\.(\d+)\.(.+)", key):
            renamed |= _open_clip_layer(f"text_model.encoder.layers.{match[1]}.", match[2], value)
        elif name := _renamed(key, OPEN_CLIP_ENDS):
            # (width, projection) in the file, where a Linear has (projection, width).
            renamed[name] = value.T.contiguous() if key == "text_projection" else value
    return config, renamed


def _open_clip_layer(layer: str, rest: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """One tensor of a layer, or the three that queries, keys and values are stacked in."""
    if rest.startswith("attn.in_proj_"):
        end = rest.removeprefix("attn.in_proj_")
        names = (f"{layer}self_attn.{letter}_proj.{end}" for letter in "qkv")
        return dict(zip(names, value.chunk(3), strict=True))
    return {layer + (_renamed(rest, OPEN_CLIP_LAYER) or rest): value}
