"""How a checkpoint would read a request: tokens, weights, schedule; without loading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypedDict

from imaged.catalogue.model import Weights
from imaged.checkpoint_info.metadata import scheduler_config, text_widths, tokenizers
from imaged.errors import CheckpointRefused
from imaged.params.image_params import ImageParams, plain
from imaged.params.knobs import Knob
from imaged.prompt.embeddings import Embeddings
from imaged.prompt.report import Reader, Reports, problems
from imaged.sampling.schedulers import (
    ALIASES,
    CLASSES,
    IN_A1111,
    PARITY,
    SCHEDULERS,
    STEPS,
    unet_calls,
)

#: Below so many steps DPM Multi leaves artefacts with SDXL: without Karras's spacing its last steps
#: are too long for its order.
DPM_STEPS = 50


Scheduler = TypedDict(
    "Scheduler",
    {
        "name": str,
        "aliases": list[str],
        "class": str,
        "profile": str,
        "settings": dict[str, Any],
        "steps": int,
        "unet_calls": int,
        "timesteps": list[float],
        "sigmas": list[float],
        "parity": float,
    },
)
Taken = TypedDict("Taken", {"field": str, "sent": Any, "as": str, "value": Any})


@dataclass(frozen=True, eq=False)
class Explainer:
    """One checkpoint's tokenizers, textual inversions and scheduler config."""

    reader: Reader
    config: Mapping[str, Any]

    @classmethod
    def of(cls, weights: Weights, embeddings: Path | None = None) -> Explainer:
        """Cached by files and their times. Raises CheckpointRefused for missing or damaged
        files.
        """
        return _explainer(weights, embeddings, _changed(weights.checkpoint))

    def scheduler(self, name: str, profile: str, steps: int) -> Scheduler:
        """Settings, timesteps (N,) and sigmas (N + 1,) of one scheduler; raises
        CheckpointRefused.
        """
        laid = STEPS[profile][name]
        path = laid.path(self.config, steps)
        lay = laid.lay.keywords if isinstance(laid.lay, partial) else {}
        trained = {k: v for k, v in asdict(path.training).items() if v is not None}
        return {
            "name": name,
            "aliases": list(ALIASES[name]),
            "class": CLASSES[name],
            "profile": profile,
            "settings": {**trained, "use_karras_sigmas": lay.get("karras", False)},
            "steps": steps,
            "unet_calls": unet_calls(name, steps),
            "timesteps": [round(time, 4) for time in path.timesteps],
            "sigmas": [round(sigma, 6) for sigma in path.sigmas],
            "parity": PARITY[profile],
        }

    def schedulers(self, profile: str, steps: int) -> list[Scheduler]:
        """All schedulers of a profile, but those that need more training timesteps."""
        found = []
        for name in IN_A1111 if profile == "a1111" else SCHEDULERS:
            try:
                found.append(self.scheduler(name, profile, steps))
            except CheckpointRefused:
                continue
        return found


def reports(reader: Reader, params: ImageParams) -> Reports:
    """Reports of prompt and negative prompt; see Reader.report."""
    prompt, negative = params.prompts
    return {
        "prompt": reader.report(prompt),
        "negative_prompt": None if negative is None else reader.report(negative),
    }


@lru_cache(maxsize=8)
def _explainer(weights: Weights, embeddings: Path | None, _: int) -> Explainer:
    try:
        widths = text_widths(weights.checkpoint)
        config = scheduler_config(weights)
        reader = Reader(tokenizers(weights.checkpoint), Embeddings(embeddings, widths))
    except OSError as error:  # without its path, which callers must not see
        name, why = weights.checkpoint.name, error.strerror
        raise CheckpointRefused(f"{name} cannot be read: {why}") from error
    except (KeyError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise CheckpointRefused(f"{weights.checkpoint.name} is not SDXL's") from error
    return Explainer(reader, config)


def _changed(checkpoint: Path) -> int:
    """Latest modification time of the small files, in nanoseconds; 0 without any."""
    folders = [checkpoint / name for name in ("", "tokenizer", "tokenizer_2", "scheduler")]
    files = [f for folder in folders if folder.is_dir() for f in folder.iterdir()]
    try:
        return max((f.stat().st_mtime_ns for f in [checkpoint, *files]), default=0)
    except OSError:
        return 0


def warnings(params: ImageParams, told: Reports | None) -> list[str]:
    """Warnings about a valid request that may surprise its caller."""
    found = []
    steps = params.num_inference_steps
    if params.scheduler == "DPM Multi" and steps < DPM_STEPS:
        found.append(
            f"scheduler: DPM Multi is known to leave artefacts with SDXL under {DPM_STEPS} steps; "
            "DPM++ 2M Karras is the same solver without them"
        )
    if params.negative_prompt and params.guidance_scale == 1:
        found.append("negative_prompt does nothing at guidance_scale 1")
    if told is not None:
        found += problems("prompt", told["prompt"])
        negative = told["negative_prompt"]
        found += problems("negative_prompt", negative) if negative else []
    return found


def taken(body: Mapping[str, Any], params: ImageParams, knobs: Sequence[Knob]) -> list[Taken]:
    """Fields that were read differently than sent: by an alias, a number as text, a
    scheduler's alias.
    """
    found = list[Taken]()
    for knob in knobs:
        if knob.name in ("prompt", "negative_prompt", "loras"):
            continue
        names = (knob.name, *knob.aliases[::-1])  # the first that was sent counts
        sent = [n for n in names if body.get(n) is not None][:1]
        value = plain(getattr(params, knob.name))
        for name in sent:
            if name != knob.name or body[name] != value:
                found.append({"field": name, "sent": body[name], "as": knob.name, "value": value})
    return found
