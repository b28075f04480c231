"""The vectors of textual inversions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from imaged.prompt.embeddings import KEYS, Embedding, Widths, read_embedding


@dataclass(frozen=True, eq=False)
class Vectors(Embedding):
    """(vectors, width) for each of the two encoders."""

    sides: tuple[torch.Tensor, torch.Tensor]


def load_embedding(path: Path, widths: Widths) -> Vectors:
    """Raises CheckpointRefused for a file that does not suit these encoders."""
    found = read_embedding(path, widths)
    tensors = load_file(path)
    return Vectors(found.name, found.vectors, (tensors[KEYS[0]], tensors[KEYS[1]]))
