"""Each of the thirteen samplers as a table, traced from the reference library.

With the number of steps fixed, a scheduler is a linear function of the initial noise, the
UNet's outputs and the fresh noises it draws. So no sampler's mathematics is written here: the
diffusers scheduler runs once on basis vectors instead of images, and what it returns are the
coefficients. One row of a table combines what an image has seen so far into the UNet's next
input; the last row gives the final latent.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import diffusers
import torch

# What of a checkpoint's scheduler config describes the model and not a sampler: the sampler is
# the caller's choice, and a config that says "Karras" must not change what "Euler" means.
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


@dataclass(frozen=True)
class Table:
    """One sampler at one number of steps.

    timesteps: (N,) what the UNet is told, call by call.
    rows:      (N + 1, 1 + N + M) float32. Column 0 is the initial unit noise, column 1 + i the
               output of call i, column 1 + N + j the j-th fresh unit noise. Row i gives the
               input of call i, row N the final latent.
    draws:     (N,) fresh noises drawn after each call; M is their sum.
    """

    timesteps: torch.Tensor
    rows: torch.Tensor
    draws: tuple[int, ...]

    @property
    def calls(self) -> int:
        return len(self.timesteps)


def build_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A fresh diffusers scheduler of this name for a checkpoint with this scheduler config."""
    class_name, overrides = CLASSES[name]
    kept = {k: v for k, v in config.items() if k in MODEL_KEYS}
    return getattr(diffusers, class_name).from_config({**kept, **overrides})


def table(name: str, steps: int, config: Mapping[str, Any]) -> Table:
    """The sampler's table, traced at first use and kept."""
    return _cached(name, steps, frozen(config))


def frozen(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A scheduler config as a key of caches."""
    pairs = ((k, tuple(v) if isinstance(v, list) else v) for k, v in config.items())
    return tuple(sorted(pairs))


@lru_cache(maxsize=256)
def _cached(name: str, steps: int, config: tuple[tuple[str, Any], ...]) -> Table:
    return trace(build_scheduler(name, dict(config)), steps)


def trace(scheduler: Any, steps: int) -> Table:
    """Run a scheduler on basis vectors; every value it returns is a row of coefficients."""
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    calls = len(timesteps)
    width = 1 + calls + 2 * calls  # no scheduler here draws more than two noises a call
    draws: list[int] = []
    rows = []
    with _noises(type(scheduler).__module__, first=1 + calls, width=width) as drawn:
        sample = _basis(0, width) * scheduler.init_noise_sigma
        for i, t in enumerate(timesteps):
            before = len(drawn)
            rows.append(scheduler.scale_model_input(sample, t))
            sample = scheduler.step(_basis(1 + i, width), t, sample, return_dict=False)[0]
            draws.append(len(drawn) - before)
        rows.append(sample)
    used = 1 + calls + sum(draws)
    matrix = torch.stack([row.flatten()[:used] for row in rows]).float()
    return Table(timesteps.float(), matrix, tuple(draws))


def _basis(i: int, width: int) -> torch.Tensor:
    """The i-th basis vector, shaped like a latent (1, width, 1, 1)."""
    vector = torch.zeros(1, width, 1, 1)
    vector[0, i] = 1
    return vector


_trace_lock = threading.Lock()  # tracing swaps a name inside diffusers' modules


@contextmanager
def _noises(module_name: str, first: int, width: int) -> Iterator[list[int]]:
    """While tracing, noise j is basis vector first + j; yields the list of those drawn."""
    import importlib

    module: Any = importlib.import_module(module_name)
    drawn: list[int] = []

    def draw(*_: Any, **__: Any) -> torch.Tensor:
        drawn.append(first + len(drawn))
        return _basis(drawn[-1], width)

    with _trace_lock:
        original = getattr(module, "randn_tensor", None)
        module.randn_tensor = draw
        try:
            yield drawn
        finally:
            if original is None:
                del module.randn_tensor
            else:
                module.randn_tensor = original
