"""What a checkpoint says of itself in small files and headers: enough to tell how a prompt is read
and where a sampler steps, without loading a net.

A single file carries no tables: its tokenizers and its scheduler's config are SDXL's own, which
come with the product.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imaged.catalogue.model import MICRO, Weights
from imaged.errors import CheckpointRefused
from imaged.prompt.embeddings import Widths
from imaged.prompt.tokenizer import Tokenizer
from imaged.weight_files import Header

Noise = dict[str, Any]  # a part of a scheduler's config
#: Of a single file's two text encoders, the tensors that are as wide as they are.
FIRST = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"
SECOND = "conditioner.embedders.1.model.token_embedding.weight"


def tables(checkpoint: Path) -> Path:
    """The folder of its tokenizers and its scheduler."""
    return checkpoint if checkpoint.is_dir() else MICRO


def tokenizers(checkpoint: Path) -> tuple[Tokenizer, Tokenizer]:
    """Of both text encoders; raises CheckpointRefused."""
    folder = tables(checkpoint)
    return Tokenizer(folder / "tokenizer"), Tokenizer(folder / "tokenizer_2")


def scheduler_config(weights: Weights) -> dict[str, Any]:
    """What the files say of the training's noise, and the operator over it."""
    checkpoint = weights.checkpoint
    config = read_json(tables(checkpoint) / "scheduler" / "scheduler_config.json")
    if not checkpoint.is_dir():
        config |= noise(Header.read(checkpoint))
    return config | _told(weights, config)


def text_widths(checkpoint: Path) -> Widths:
    """Of both text encoders."""
    if checkpoint.is_dir():
        configs = (checkpoint / f"text_encoder{n}" / "config.json" for n in ("", "_2"))
        first, second = (read_json(config)["hidden_size"] for config in configs)
    else:
        shapes = Header.read(checkpoint).shapes
        first, second = (shapes[name][1] for name in (FIRST, SECOND))
    return first, second


def noise(header: Header) -> Noise:
    """What a file says of the noise that it was trained with, in words of scheduler configs.

    Marks that trainers leave: tensors without content, or remarks.
    """
    said = header.metadata
    prediction = said.get("modelspec.prediction_type", "").lower()
    v = prediction in ("v", "v_prediction", "v-prediction")
    if prediction and not v and prediction not in ("epsilon", "eps"):
        raise CheckpointRefused(f"{header.path.name} predicts {prediction}, which is not served")
    v = v or "v_pred" in header.shapes or _says(said, "ss_v_parameterization")
    zero = "ztsnr" in header.shapes or _says(said, "ss_zero_terminal_snr")
    return _terms("v_prediction" if v else "epsilon", zero)


def read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text("utf-8"))
    assert isinstance(content, dict)
    return content


def _told(weights: Weights, config: Mapping[str, Any]) -> Noise:
    """What the operator says of the noise."""
    if not weights.prediction and weights.zero_snr is None:
        return {}
    prediction = weights.prediction or config.get("prediction_type", "epsilon")
    zero = config.get("rescale_betas_zero_snr", False)
    told = _terms(prediction, zero if weights.zero_snr is None else weights.zero_snr)
    return {"rescale_betas_zero_snr": False} | told


def _terms(prediction: str, zero_snr: bool) -> Noise:
    """Scheduler config of a kind of training.

    Where training ended in noise alone, sampling has to begin there (Lin et al. 2024, 3.3).
    """
    spacing = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {"prediction_type": prediction} | (spacing if zero_snr else {})


def _says(metadata: Mapping[str, str], name: str) -> bool:
    return metadata.get(name, "").lower() == "true"
