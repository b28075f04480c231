"""Weight files: headers, refusals and digests, without reading tensors.

A safetensors file begins with the length of a JSON header, which names each tensor's type, shape
and place. It cannot contain code. File names are not trusted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from imaged.errors import CheckpointRefused

DTYPES = ("F16", "BF16", "F32", "F64")  # that weights may have
CHUNK = 1 << 22  # bytes read at a time for the digest

CONVERT = (
    "a pickle can run code on the machine that opens it, so it is not opened. If you trust where "
    "it came from: python -c \"import torch, safetensors.torch as s; d = torch.load('IN.ckpt', "
    "weights_only=True); d = d.get('state_dict', d); s.save_file({k: v.clone().contiguous() "
    "for k, v in d.items() if torch.is_tensor(v)}, 'OUT.safetensors')\""
)
#: First bytes of files that are often mistaken for safetensors.
BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (rb"$", "is empty"),
    (rb"PK\x03\x04", f"is a pickle, as torch.save writes them: {CONVERT}"),
    (rb"\x80[\x01-\x05]", f"is a pickle: {CONVERT}"),
    (rb"GGUF", "is a GGUF file, which is not served; take the safetensors file"),
    (rb"version https://git-lfs", "is a pointer of Git LFS, not the file itself: git lfs pull"),
    (rb"(?i)\s*<(!doctype|html)", "is a web page: what was downloaded is not the file"),
)
#: Other kinds of models, by a tensor that only they have.
OTHERS: tuple[tuple[str, str], ...] = (
    (r"lora_(unet|te\d?)_|.*\.lora_(A|B|up|down)\b|.*\.hada_w1_a$", "a LoRA, not a checkpoint"),
    (r"(control_model|controlnet_\w+|input_hint_block)\.", "a ControlNet, not a checkpoint"),
    (r"(clip_g|clip_l|emb_params)$", "a textual inversion, not a checkpoint"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "a FLUX model"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "a Stable Diffusion 3 model"),
    (r"cond_stage_model\.model\.", "a Stable Diffusion 2 checkpoint"),
    (r"cond_stage_model\.transformer\.", "a Stable Diffusion 1 checkpoint"),
    (r"conditioner\.embedders\.0\.model\.", "the SDXL refiner, which makes no picture by itself"),
    (r"edm_(mean|std)$|edm_vpred\.sigma_max$", "an EDM model (Playground 2.5, CosXL)"),
)


@dataclass(frozen=True)
class Header:
    """Header of a safetensors file: shape and type of each tensor, and metadata."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Header:
        """Raises CheckpointRefused for another or a truncated file."""
        try:
            with safe_open(path, framework="np") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                return cls(
                    path,
                    {key: tuple(part.get_shape()) for key, part in slices.items()},
                    {key: part.get_dtype() for key, part in slices.items()},
                    file.metadata() or {},
                )
        except (SafetensorError, OSError) as error:
            try:
                what = _what_else(path)
            except OSError as unread:
                what = f"cannot be read: {unread.strerror}"
            raise CheckpointRefused(f"{path.name} {what}") from error

    def refuse_others(self) -> None:
        """Raise CheckpointRefused, naming what it is, for a model that is not SDXL's base."""
        for pattern, what in OTHERS:
            if any(re.match(pattern, key) for key in self.shapes):
                raise CheckpointRefused(f"{self.path.name} is {what}; SDXL checkpoints are served")

    def refuse_odd_types(self, keys: Iterable[str]) -> None:
        """Raise CheckpointRefused for quantized tensors and other unusual types."""
        for key in keys:
            if self.dtypes[key] not in DTYPES:
                raise CheckpointRefused(
                    f"{self.path.name}: {key} is of type {self.dtypes[key]}; weights should be "
                    f"{', '.join(DTYPES)}"
                )


def _what_else(path: Path) -> str:
    """Why a file is not a whole safetensors file."""
    with path.open("rb") as file:
        begin = file.read(64)
        for pattern, what in BEGINNINGS:
            if re.match(pattern, begin):
                return what
        length = int.from_bytes(begin[:8], "little")
        if begin[8:9] != b"{":
            return f"is not a safetensors file, and any other can be a pickle: {CONVERT}"
        file.seek(8)
        try:
            header = json.loads(file.read(min(length, 100_000_000)))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "is damaged: its header cannot be read"
    size = path.stat().st_size
    if size < whole:
        return f"is cut off: it has {size:,} bytes of {whole:,}"
    return "is damaged: its header does not agree with itself"


def digest(files: Mapping[str, Path], stop: Callable[[], bool] = lambda: False) -> str:
    """SHA-256 of one file, as model sites give it; of several files that of their digests and
    names. Empty if `stop` says so.
    """
    found = {name: _digest(path, stop) for name, path in sorted(files.items())}
    if len(found) == 1:
        return next(iter(found.values()))
    lines = "".join(f"{value}  {name}\n" for name, value in found.items())
    return "" if stop() else hashlib.sha256(lines.encode()).hexdigest()


def _digest(path: Path, stop: Callable[[], bool]) -> str:
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while (chunk := file.read(CHUNK)) and not stop():
            found.update(chunk)
    return "" if stop() else found.hexdigest()
