"""The part `export`: the checkpoint's folder in half precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import torch

from training.micro.architecture import CHECKPOINT, build_scheduler
from training.micro.parts.assembled import parts_of
from training.micro.parts.run import Options, earlier

TOKENIZERS = ("tokenizer", "tokenizer_2")


def scaled(weights: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """A UNet that reads every text as if all of it weighed `scale` (decision 9)."""
    sides = ("attn2.to_k.weight", "attn2.to_v.weight")
    return {name: w * scale if name.endswith(sides) else w for name, w in weights.items()}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=CHECKPOINT, show_default=True)
@click.option(
    "--mix",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A copy of unet.pt from earlier in the training, to average with.",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="Of that copy in the mean.",
)
@click.option(
    "--text-scale",
    default=0.85,
    show_default=True,
    help="Of every text's keys and values: below 1, what weighs little counts for less.",
)
@click.pass_obj
def export(options: Options, out: Path, mix: Path | None, share: float, text_scale: float) -> None:
    """Write the averaged weights as a diffusers folder in half precision."""
    weights = earlier(options.work, "unet.pt", "unet")["average"]
    if mix is not None:  # what the last steps forgot of other sizes comes back
        before = earlier(mix.parent, mix.name, "unet")["average"]
        weights = {name: w.lerp(before[name], share) for name, w in weights.items()}
    weights = scaled(weights, text_scale)
    for name, net in parts_of(options.work, weights).items():
        net.half().save_pretrained(out / name, safe_serialization=True)
    build_scheduler().save_pretrained(out / "scheduler")
    for name in TOKENIZERS if out.resolve() != CHECKPOINT else ():
        shutil.copytree(CHECKPOINT / name, out / name, dirs_exist_ok=True)
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    click.echo(f"{out}: {size / 1e6:.1f} MB")
