"""A checkpoint on disk to nets on a device, without any network.

Two forms: a diffusers folder, and one safetensors file in the original SDXL layout. The
file carries no configs, so they are read off its tensors' shapes; tokenizers and the
scheduler's config are SDXL's own and come with the product.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from imaged.catalogue import MICRO
from imaged.engine.memory import is_full
from imaged.engine.nets.net import Tensors
from imaged.engine.nets.text import ProjectingTextEncoder, TextConfig, TextEncoder
from imaged.engine.nets.unet import UNetConfig, UNetModel
from imaged.engine.nets.vae import VAE, VAEConfig
from imaged.engine.prompt.tokenizer import Tokenizer
from imaged.engine.single_file import read_single_file
from imaged.errors import CheckpointRefused

# What the libraries raise on files that are damaged or are something else.
_BROKEN = (OSError, ValueError, KeyError, TypeError, AssertionError, RuntimeError, SafetensorError)
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
NETS: dict[str, tuple[Any, Any]] = {
    "unet": (UNetConfig, UNetModel),
    "vae": (VAEConfig, VAE),
    "text_encoder": (TextConfig, TextEncoder),
    "text_encoder_2": (TextConfig, ProjectingTextEncoder),
}
Part = tuple[Mapping[str, Any], Tensors]  # config.json of a net and its weights


@dataclass(frozen=True)
class Nets:
    """Everything of one checkpoint that the engine runs."""

    unet: UNetModel
    vae: VAE
    text_encoder: TextEncoder
    text_encoder_2: ProjectingTextEncoder
    tokenizer: Tokenizer
    tokenizer_2: Tokenizer
    scheduler_config: Mapping[str, Any]
    force_zeros_for_empty_prompt: bool

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.unet.config.in_channels

    @property
    def factor(self) -> int:
        """Pixels a side of one latent cell."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_threads(threads: int) -> None:
    """CPU threads of torch in this process; 0 leaves its own choice."""
    if threads:
        torch.set_num_threads(threads)


def load(checkpoint: Path, device: torch.device | None = None) -> Nets:
    """Load a diffusers folder or a single file; raises CheckpointRefused with the reason.

    float32 on the CPU; on a GPU bfloat16, which overflows no sooner than float32. UNet and VAE have
    their channels last, as the convolutions of either want them.
    """
    device = device or best_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        if checkpoint.is_dir():
            return _load_folder(checkpoint, device, dtype)
        if checkpoint.is_file():
            parts = read_single_file(checkpoint)
            return assemble(parts, tokenizers=MICRO, device=device, dtype=dtype)
        raise CheckpointRefused(f"there is no file or folder {checkpoint}")
    except (*_BROKEN, MemoryError) as error:
        if is_full(error):
            raise CheckpointRefused(
                f"{checkpoint.name} does not fit into {device}'s memory"
            ) from error
        raise CheckpointRefused(f"{checkpoint.name} is not an SDXL checkpoint: {error}") from error


def assemble(
    parts: Mapping[str, Part],
    *,
    tokenizers: Path,
    device: torch.device,
    dtype: torch.dtype,
    scheduler_config: Mapping[str, Any] | None = None,
    force_zeros: bool = True,
) -> Nets:
    """Nets of the four parts' configs and weights; `tokenizers` is a folder with both of them."""
    scheduler = scheduler_config or _json(MICRO / "scheduler" / "scheduler_config.json")
    configs = {}
    for part, (config, _) in NETS.items():
        with _named(part):
            configs[part] = config.read(parts[part][0])
    _check(configs, scheduler)
    nets = {}
    for part, (_, cls) in NETS.items():
        with _named(part):
            tensors = {k.removeprefix("text_model."): v for k, v in parts[part][1].items()}
            nets[part] = cls.build(configs[part], tensors, device, dtype)
    for part in ("unet", "vae"):
        nets[part].to(memory_format=torch.channels_last)
    return Nets(
        **nets,
        tokenizer=Tokenizer(tokenizers / "tokenizer"),
        tokenizer_2=Tokenizer(tokenizers / "tokenizer_2"),
        scheduler_config=scheduler,
        force_zeros_for_empty_prompt=force_zeros,
    )


@contextmanager
def _named(part: str) -> Iterator[None]:
    """Say in which part of the checkpoint it is."""
    try:
        yield
    except CheckpointRefused as error:
        raise CheckpointRefused(f"{part}: {error}") from error


def _check(configs: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    """What the engine takes for granted; raises CheckpointRefused."""
    unet, vae = configs["unet"], configs["vae"]
    widths = [configs[part].hidden_size for part in ("text_encoder", "text_encoder_2")]
    pooled = configs["text_encoder_2"].projection_dim
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise CheckpointRefused(
            f"the UNet takes {unet.in_channels} channels and gives {unet.out_channels}, the VAE "
            f"has {vae.latent_channels}: checkpoints for inpainting and editing are not served"
        )
    told = pooled + 6 * unet.addition_time_embed_dim
    if (unet.cross_attention_dim, unet.projection_class_embeddings_input_dim) != (
        sum(widths),
        told,
    ):
        raise CheckpointRefused("the UNet does not read SDXL's two text encoders and sizes")
    kind = str(scheduler.get("_class_name", ""))
    if kind.startswith("EDM") or "Flow" in kind:
        raise CheckpointRefused(f"its scheduler {kind} is not one of SDXL's")
    if scheduler.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise CheckpointRefused(f"prediction type {scheduler['prediction_type']} is not served")


def _load_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> Nets:
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise CheckpointRefused(f"the folder {folder.name} lacks {', '.join(missing)}")
    index = _json(folder / "model_index.json")
    return assemble(
        {part: (_json(folder / part / "config.json"), _weights(folder / part)) for part in NETS},
        tokenizers=folder,
        device=device,
        dtype=dtype,
        scheduler_config=_json(folder / "scheduler" / "scheduler_config.json"),
        force_zeros=bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def _weights(folder: Path) -> Tensors:
    """A net's tensors, mapped, from one file or several; in half precision if there is no other."""
    for variant in ("", r"\.fp16"):
        form = re.compile(rf"(diffusion_pytorch_)?model{variant}(-\d+-of-\d+)?\.safetensors")
        files = [file for file in folder.iterdir() if form.fullmatch(file.name)]
        if files:
            return {k: v for file in files for k, v in load_file(file).items()}
    raise CheckpointRefused(
        f"{folder.name} has no safetensors weights; other formats can run code and are refused"
    )


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text("utf-8"))
    assert isinstance(content, dict)
    return content
