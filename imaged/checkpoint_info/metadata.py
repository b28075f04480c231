"""Configuration of a checkpoint from its small files and headers: tokenizers and scheduler.

A single file has neither: SDXL's own come with the product.
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
#: Tensors of a single file that tell the widths of its text encoders.
FIRST = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"
SECOND = "conditioner.embedders.1.model.token_embedding.weight"


def tables(checkpoint: Path) -> Path:
    """The folder of tokenizers and scheduler config."""
    return checkpoint if checkpoint.is_dir() else MICRO


def tokenizers(checkpoint: Path) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizers of both text encoders; raises CheckpointRefused."""
    folder = tables(checkpoint)
    return Tokenizer(folder / "tokenizer"), Tokenizer(folder / "tokenizer_2")


def scheduler_config(weights: Weights) -> dict[str, Any]:
    """The scheduler config, overridden by what the operator set for the model."""
    checkpoint = weights.checkpoint
    config = read_json(tables(checkpoint) / "scheduler" / "scheduler_config.json")
    if not checkpoint.is_dir():
        config |= noise(Header.read(checkpoint))
    return config | _told(weights, config)


def text_widths(checkpoint: Path) -> Widths:
    """Hidden sizes of both text encoders."""
    if checkpoint.is_dir():
        configs = (checkpoint / f"text_encoder{n}" / "config.json" for n in ("", "_2"))
        first, second = (read_json(config)["hidden_size"] for config in configs)
    else:
        shapes = Header.read(checkpoint).shapes
        first, second = (shapes[name][1] for name in (FIRST, SECOND))
    return first, second


def noise(header: Header) -> Noise:
    """Prediction type and zero terminal SNR of a single file, as a scheduler config.

    Trainers leave them as metadata, or as marker tensors ("v_pred", "ztsnr").
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
    """The operator's settings as a scheduler config."""
    if not weights.prediction and weights.zero_snr is None:
        return {}
    prediction = weights.prediction or config.get("prediction_type", "epsilon")
    zero = config.get("rescale_betas_zero_snr", False)
    told = _terms(prediction, zero if weights.zero_snr is None else weights.zero_snr)
    return {"rescale_betas_zero_snr": False} | told


def _terms(prediction: str, zero_snr: bool) -> Noise:
    """A scheduler config. With zero terminal SNR sampling has to start at the last timestep (Lin et
    al. 2024, 3.3).
    """
    spacing = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {"prediction_type": prediction} | (spacing if zero_snr else {})


def _says(metadata: Mapping[str, str], name: str) -> bool:
    return metadata.get(name, "").lower() == "true"
