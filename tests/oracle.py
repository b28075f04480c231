"""The reference for samplers: diffusers' scheduler classes, traced into tables of their own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch

from imaged.engine.sampling.tables import Table

# What of a checkpoint's scheduler config describes the model; the rest is another sampler's.
MODEL_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "rescale_betas_zero_snr",
)
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "DPM Multi": ("DPMSolverMultistepScheduler", {}),
    "DPM Single": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM2 a Karras": ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM2 Karras": ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "DDPM": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}


def build_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A fresh diffusers scheduler of this name for a checkpoint with this scheduler config."""
    class_name, overrides = CLASSES[name]
    kept = {k: v for k, v in config.items() if k in MODEL_KEYS}
    kind = getattr(diffusers, class_name)
    if not class_name.startswith("KDPM2"):
        return kind.from_config({**kept, **overrides})
    # These lay out all T steps when they are made, for more than a second; none of it stays.
    with mock.patch.object(kind, "_sigma_to_t", lambda _, sigma, __: sigma):
        return kind.from_config({**kept, **overrides})


class Wide:
    """A library whose float32 is float64."""

    def __init__(self, library: Any) -> None:
        self._library, self.float32 = library, library.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


def trace(scheduler: Any, steps: int, *, wide: bool = False) -> Table:
    """Run a scheduler on basis vectors; every value it returns is a row of coefficients.

    wide: in float64 from the float32 alphas on, so that what differs from it is not its own
    rounding, which few steps over much noise make large.
    """
    module: Any = importlib.import_module(type(scheduler).__module__)
    with mock.patch.multiple(module, np=Wide(np), torch=Wide(torch)) if wide else nullcontext():
        if wide:
            _widen(scheduler)
        return _trace(scheduler, steps, torch.float64 if wide else torch.float32)


def _widen(scheduler: Any) -> None:
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(scheduler, name, value.double())


def _trace(scheduler: Any, steps: int, dtype: torch.dtype) -> Table:
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    calls = len(timesteps)
    basis = torch.eye(1 + 3 * calls, dtype=dtype)[:, None, :, None, None]  # as latents (1, W, 1, 1)
    drawn: list[int] = []

    def draw(*_: Any, **__: Any) -> torch.Tensor:
        drawn.append(len(drawn))
        return basis[calls + len(drawn)]

    draws, rows = [], []
    module = type(scheduler).__module__
    with mock.patch(f"{module}.randn_tensor", draw, create=True):
        sample = basis[0] * scheduler.init_noise_sigma
        for i, t in enumerate(timesteps):
            before = len(drawn)
            rows.append(scheduler.scale_model_input(sample, t))
            sample = scheduler.step(basis[1 + i], t, sample, return_dict=False)[0]
            draws.append(len(drawn) - before)
        rows.append(sample)
    used = 1 + calls + sum(draws)
    matrix = torch.stack([row.flatten()[:used] for row in rows]).float()
    return Table(timesteps.float(), matrix, tuple(draws))
