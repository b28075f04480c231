"""A checkpoint on disk to nets on a device, without any network.

Two forms: a diffusers folder, and one safetensors file in the original SDXL layout. The
file carries no configs, so they are read off its tensors' shapes; tokenizers and the
scheduler's config are SDXL's own and come with the product.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from imaged.catalogue import MICRO
from imaged.engine.memory import is_full
from imaged.engine.single_file import load_single_file
from imaged.errors import CheckpointRefused

transformers.utils.logging.disable_progress_bar()  # theirs would run through ours

# What the libraries raise on files that are damaged or are something else.
_BROKEN = (OSError, ValueError, KeyError, TypeError, AssertionError, RuntimeError, SafetensorError)
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


@dataclass(frozen=True)
class Nets:
    """Everything of one checkpoint that the engine runs."""

    unet: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any
    tokenizer: Any
    tokenizer_2: Any
    scheduler_config: Mapping[str, Any]
    force_zeros_for_empty_prompt: bool

    @property
    def device(self) -> torch.device:
        return torch.device(self.unet.device)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return int(self.unet.config.in_channels)

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
            nets = _load_folder(checkpoint, dtype)
        elif checkpoint.is_file():
            nets = Nets(
                **load_single_file(checkpoint, dtype),
                tokenizer=_tokenizer(MICRO, "tokenizer"),
                tokenizer_2=_tokenizer(MICRO, "tokenizer_2"),
                scheduler_config=_json(MICRO / "scheduler" / "scheduler_config.json"),
                force_zeros_for_empty_prompt=True,
            )
        else:
            raise CheckpointRefused(f"there is no file or folder {checkpoint}")
        _check(nets)
        for net in (nets.unet, nets.vae, nets.text_encoder, nets.text_encoder_2):
            net.to(device).eval().requires_grad_(False)
        for net in (nets.unet, nets.vae):
            net.to(memory_format=torch.channels_last)
    except (*_BROKEN, MemoryError) as error:
        if is_full(error):
            raise CheckpointRefused(
                f"{checkpoint.name} does not fit into {device}'s memory"
            ) from error
        raise CheckpointRefused(f"{checkpoint.name} is not an SDXL checkpoint: {error}") from error
    return nets


def _check(nets: Nets) -> None:
    """What the engine takes for granted; raises CheckpointRefused."""
    unet, scheduler = nets.unet.config, nets.scheduler_config
    widths = [net.config.hidden_size for net in (nets.text_encoder, nets.text_encoder_2)]
    if not unet.in_channels == unet.out_channels == nets.vae.config.latent_channels:
        raise CheckpointRefused(
            f"the UNet takes {unet.in_channels} channels and gives {unet.out_channels}, the VAE "
            f"has {nets.vae.config.latent_channels}: checkpoints for inpainting and editing are "
            "not served"
        )
    if unet.addition_embed_type != "text_time" or unet.cross_attention_dim != sum(widths):
        raise CheckpointRefused("the UNet does not read SDXL's two text encoders and sizes")
    kind = str(scheduler.get("_class_name", ""))
    if kind.startswith("EDM") or "Flow" in kind:
        raise CheckpointRefused(f"its scheduler {kind} is not one of SDXL's")
    if scheduler.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise CheckpointRefused(f"prediction type {scheduler['prediction_type']} is not served")


def _load_folder(folder: Path, dtype: torch.dtype) -> Nets:
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise CheckpointRefused(f"the folder {folder.name} lacks {', '.join(missing)}")
    classes: dict[str, Any] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    index = _json(folder / "model_index.json")
    return Nets(
        **{part: _net(cls, folder, part, dtype) for part, cls in classes.items()},
        tokenizer=_tokenizer(folder, "tokenizer"),
        tokenizer_2=_tokenizer(folder, "tokenizer_2"),
        scheduler_config=_json(folder / "scheduler" / "scheduler_config.json"),
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def _net(cls: Any, folder: Path, part: str, dtype: torch.dtype) -> Any:
    """One net with every weight from the files: the libraries would draw missing ones at random."""
    names = [path.name for path in (folder / part).glob("*.safetensors")]
    half = bool(names) and all(".fp16." in name for name in names)
    net, info = cls.from_pretrained(
        folder,
        subfolder=part,
        variant="fp16" if half else None,
        local_files_only=True,
        use_safetensors=True,
        low_cpu_mem_usage=False,
        output_loading_info=True,
        **_dtype(part, dtype),
    )
    absent = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if absent:
        raise CheckpointRefused(f"{part} lacks {len(absent)} weights, {absent[0]} among them")
    return net


def _dtype(part: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The two libraries name it differently."""
    return {"dtype" if part.startswith("text") else "torch_dtype": dtype}


def _tokenizer(folder: Path, part: str) -> Any:
    return CLIPTokenizer.from_pretrained(folder, subfolder=part, local_files_only=True)


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text("utf-8"))
    assert isinstance(content, dict)
    return content
