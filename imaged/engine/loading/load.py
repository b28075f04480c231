"""Load a checkpoint from disk to a device: a diffusers folder, or a single file in SDXL's original
layout.

A single file has no configs: they follow from tensor shapes; tokenizers and scheduler config are
SDXL's own. Files are memory-mapped, and tensors converted one by one, so that there is no second
copy.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from imaged.catalogue.model import MICRO, Weights
from imaged.checkpoint_info.metadata import read_json, scheduler_config
from imaged.checkpoint_info.metadata import tokenizers as read_tokenizers
from imaged.engine.cpu import Cpu
from imaged.engine.loading.diffusers_folder import (
    TABLES,
    Part,
    folder_files,
    read_folder,
    read_part,
)
from imaged.engine.loading.single_file import PARTS, read_single_file, read_vae
from imaged.engine.nets.text import ProjectingTextEncoder, TextConfig, TextEncoder
from imaged.engine.nets.unet import UNetConfig, UNetModel
from imaged.engine.nets.vae import VAE, VAEConfig
from imaged.engine.out_of_memory import is_full
from imaged.errors import CheckpointRefused
from imaged.prompt.tokenizer import Tokenizer
from imaged.weight_files import Header, digest

log = logging.getLogger(__name__)

# Exceptions of the libraries for damaged or other files.
_BROKEN = (OSError, ValueError, KeyError, TypeError, AssertionError, RuntimeError, SafetensorError)
NETS: dict[str, tuple[Any, Any]] = {
    "unet": (UNetConfig, UNetModel),
    "vae": (VAEConfig, VAE),
    "text_encoder": (TextConfig, TextEncoder),
    "text_encoder_2": (TextConfig, ProjectingTextEncoder),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Nets:
    """Nets, tokenizers and configs of a loaded checkpoint."""

    unet: UNetModel
    vae: VAE
    text_encoder: TextEncoder
    text_encoder_2: ProjectingTextEncoder
    tokenizer: Tokenizer
    tokenizer_2: Tokenizer
    scheduler_config: Mapping[str, Any]
    force_zeros_for_empty_prompt: bool
    sha256: str = ""  # of the files
    file_bytes: int = 0

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def nbytes(self) -> int:
        """Bytes of all weights on the device."""
        nets = (self.unet, self.vae, self.text_encoder, self.text_encoder_2)
        return sum(weight.nbytes for net in nets for weight in net.parameters())

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.unet.config.in_channels

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell, on each side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_threads(threads: int) -> None:
    """CPU threads of torch in this process; 0 leaves its own choice."""
    if threads:
        torch.set_num_threads(threads)


def load(
    weights: Weights | Path, device: torch.device | None = None, *, show: bool = False
) -> Nets:
    """Load a checkpoint; raises CheckpointRefused with the reason.

    The SHA-256 of the files is computed in parallel, and compared with the recorded one if any.
    show: a progress bar on stderr.
    """
    weights = Weights(weights) if isinstance(weights, Path) else weights
    device = device or best_device()
    if device.type == "cpu" and _dtypes(weights, device)[0] == torch.bfloat16:
        _slowly(weights.checkpoint.name)
    try:
        files = _files(weights)
        with _digested(files) as found:
            nets = _load(weights, device, show)
            size = sum(path.stat().st_size for path in files.values())
            nets = replace(nets, sha256=found(), file_bytes=size)
    except (*_BROKEN, MemoryError) as error:
        name = weights.checkpoint.name
        if is_full(error):
            raise CheckpointRefused(f"{name} does not fit into {device}'s memory") from error
        raise CheckpointRefused(f"{name} is not an SDXL checkpoint: {error}") from error
    if weights.sha256 not in ("", nets.sha256):
        raise CheckpointRefused(
            f"{weights.checkpoint.name} is not the file that was added (its SHA-256 is now "
            f"{nets.sha256}); imaged models add takes it anew"
        )
    return nets


def size(weights: Weights, device: torch.device) -> int:
    """Bytes that a checkpoint will take on a device, from file headers, an upper bound; raises
    CheckpointRefused.
    """
    dtype, of_vae = _dtypes(weights, device)
    return sum(
        count * (of_vae if part == "vae" else dtype).itemsize
        for part, count in numbers(weights).items()
    )


def numbers(weights: Weights) -> dict[str, int]:
    """Number of parameters of UNet, VAE and the rest, from file headers; raises
    CheckpointRefused.
    """
    found = dict.fromkeys(("unet", "vae", "texts"), 0)
    for name, path in _files(weights).items():
        folder = name.rpartition("/")[0]
        shapes = {} if path.suffix in TABLES else Header.read(path).shapes
        for key, shape in shapes.items():
            prefixes = (("unet", PARTS["unet"][0]), ("vae", PARTS["vae"][0]))
            parts = (part for part, its in prefixes if folder == part or key.startswith(its))
            found[next(parts, "texts")] += math.prod(shape)
    return found


def memory(device: torch.device) -> int:
    """Bytes of memory of a device, or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def _digested(files: Mapping[str, Path]) -> Iterator[Callable[[], str]]:
    """Compute the digest in a thread; it is stopped when the block is left early."""
    stop = threading.Event()
    with ThreadPoolExecutor(1, "digest") as beside:
        try:
            yield beside.submit(digest, files, stop.is_set).result
        finally:
            stop.set()


def _files(weights: Weights) -> dict[str, Path]:
    """Files that affect images, by name within the checkpoint; raises CheckpointRefused."""
    files: dict[str, Path] = {}
    for name, path in (("", weights.checkpoint), ("vae/", weights.vae)):
        if path is None:
            continue
        if path.is_dir():
            files |= {f"{name}{p.relative_to(path)}": p for p in folder_files(path)}
        elif path.is_file():
            files[f"{name}{path.name}"] = path
        else:
            raise CheckpointRefused(f"there is no file or folder {path}")
    return files


def _load(weights: Weights, device: torch.device, show: bool) -> Nets:
    checkpoint, (dtype, vae_dtype) = weights.checkpoint, _dtypes(weights, device)
    index: dict[str, Any] = {}
    vae = _vae(weights.vae)
    if checkpoint.is_dir():
        parts = read_folder(checkpoint, {"vae": vae} if vae else {})
        index = read_json(checkpoint / "model_index.json")
    else:
        parts = read_single_file(checkpoint, vae)
    return assemble(
        parts,
        tokenizers=checkpoint,
        device=device,
        dtype=dtype,
        vae_dtype=vae_dtype,
        scheduler_config=scheduler_config(weights),
        force_zeros=bool(index.get("force_zeros_for_empty_prompt", True)),
        show=show,
    )


def _vae(path: Path | None) -> Part | None:
    if path is None:
        return None
    return read_part(path) if path.is_dir() else read_vae(path)


def best_dtype(device: torch.device) -> torch.dtype:
    """float32 on the CPU; on a GPU bfloat16 (the range of float32) if it has it, else float16."""
    if device.type == "cpu":
        return torch.float32
    has = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has else torch.float16


def _dtypes(weights: Weights, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """(UNet and text encoders, VAE)."""
    if device.type == "cpu" and not weights.dtype and weights.cpu_dtype:
        return DTYPES[weights.cpu_dtype], torch.float32
    dtype = DTYPES[weights.dtype] if weights.dtype else best_dtype(device)
    return dtype, _vae_dtype(dtype)


def with_dtypes(weights: Weights, made_in: str, device: torch.device) -> Weights:
    """The weights with the dtypes of a receipt (receipts.made_in), if it is of this kind of device;
    unchanged for another kind, where bits differ anyway.
    """
    kind, _, dtypes = made_in.partition(" ")
    if kind != device.type:
        return weights
    mixed = replace(weights, dtype="", cpu_dtype="bf16")
    for made in (weights, mixed, *(replace(weights, dtype=name) for name in DTYPES)):
        names = dict.fromkeys(str(held).removeprefix("torch.") for held in _dtypes(made, device))
        if " and ".join(names) == dtypes:
            return made
    return weights


def _vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """The VAE's dtype: SDXL's VAE overflows in float16, and images would be black."""
    return torch.float32 if dtype == torch.float16 else dtype


@cache
def _slowly(name: str) -> None:
    """Warn once that this CPU emulates bfloat16."""
    if not Cpu.here().has_bf16:
        log.warning("%s is in bfloat16, which this CPU does not compute in itself: slow", name)


def assemble(
    parts: Mapping[str, Part],
    *,
    tokenizers: Path,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype | None = None,
    scheduler_config: Mapping[str, Any] | None = None,
    force_zeros: bool = True,
    show: bool = False,
) -> Nets:
    """Build the nets from config and tensors of each part.

    tokenizers: the checkpoint whose tokenizers to use. UNet and VAE are in channels_last format.
    """
    scheduler = scheduler_config or read_json(MICRO / "scheduler" / "scheduler_config.json")
    configs = {}
    for part, (config, _) in NETS.items():
        with _named(part):
            configs[part] = config.read(parts[part][0])
    _check(configs, scheduler)
    tensors = {
        part: {k.removeprefix("text_model."): v for k, v in parts[part][1].items()} for part in NETS
    }
    size = sum(v.nbytes for part in tensors.values() for v in part.values())
    first, second = read_tokenizers(tokenizers)
    nets = {}
    with _bar(size, show) as done:
        for part, (_, cls) in NETS.items():
            with _named(part):
                kind = (vae_dtype or _vae_dtype(dtype)) if part == "vae" else dtype
                nets[part] = cls.build(configs[part], tensors[part], device, kind, done)
    for part in ("unet", "vae"):
        nets[part].to(memory_format=torch.channels_last)
    return Nets(
        **nets,
        tokenizer=first,
        tokenizer_2=second,
        scheduler_config=scheduler,
        force_zeros_for_empty_prompt=force_zeros,
    )


@contextmanager
def _bar(size: int, show: bool) -> Iterator[Callable[[int], Any]]:
    """A function that takes the number of bytes loaded since its last call."""
    if not show:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=size, desc="loading", unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update


@contextmanager
def _named(part: str) -> Iterator[None]:
    """Prefix CheckpointRefused with the part's name."""
    try:
        yield
    except CheckpointRefused as error:
        raise CheckpointRefused(f"{part}: {error}") from error


def _check(configs: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    """Raises CheckpointRefused unless the configs are those of SDXL's base."""
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
