"""Each of the thirteen samplers as a table.

With the number of steps fixed, a sampler is a linear function of the initial noise, the UNet's
outputs and the fresh noises it draws. So it runs once on basis vectors instead of images
(solvers.Walk), and what comes out are the coefficients. One row of a table combines what an image
has seen so far into the UNet's next input; the last row gives the final latent.

What each sampler does with a checkpoint's scheduler config, absent keys included, is what the
class of the same name in diffusers does; the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from imaged.engine import solvers
from imaged.engine.schedule import (
    Path,
    Training,
    Vector,
    on_alphas,
    on_k_sigmas,
    on_lambdas,
    on_sigmas,
)
from imaged.engine.solvers import Walk


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


@dataclass(frozen=True)
class Sampler:
    """A solver, where it steps, and how it reads a scheduler config."""

    solve: Callable[[Walk], Vector]
    path: Callable[[Training, int], Path]
    absent: Mapping[str, Any] = field(default_factory=dict)  # what a key means that is not there
    ignores: tuple[str, ...] = ()


_LEADING = {"timestep_spacing": "leading"}
_SDXL_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_SNR = ("rescale_betas_zero_snr",)
_SPACING = ("timestep_spacing", "steps_offset")
_karras_sigmas = partial(on_sigmas, karras=True)
_karras_lambdas = partial(on_lambdas, karras=True)

SAMPLERS: dict[str, Sampler] = {
    "DDIM": Sampler(solvers.ddim, on_alphas, _LEADING),
    "DPM Multi": Sampler(solvers.dpm_multistep, on_lambdas),
    "DPM Single": Sampler(solvers.dpm_singlestep, on_lambdas, ignores=_SNR + _SPACING),
    "Euler a": Sampler(solvers.euler_ancestral, on_sigmas),
    "Euler": Sampler(solvers.euler, on_sigmas),
    "Heun": Sampler(solvers.heun, on_sigmas, _SDXL_BETAS, _SNR),
    "DPM++ 2M Karras": Sampler(solvers.dpm_multistep, _karras_lambdas),
    "DPM2 a Karras": Sampler(solvers.dpm2_ancestral, _karras_sigmas, _SDXL_BETAS, _SNR),
    "DPM2 Karras": Sampler(solvers.dpm2, _karras_sigmas, _SDXL_BETAS, _SNR),
    "LMS": Sampler(solvers.lms, on_sigmas, ignores=_SNR),
    "PNDM": Sampler(solvers.pndm, on_alphas, _LEADING, _SNR),
    "DDPM": Sampler(solvers.ddpm, on_alphas, _LEADING),
    "UniPC": Sampler(solvers.unipc, on_lambdas),
}
#: The same solvers where k-diffusion has them step in A1111.
_uniform, _karras_all = on_k_sigmas, partial(on_k_sigmas, karras=True)
_karras_but_one = partial(on_k_sigmas, karras=True, drop=True)
IN_A1111: dict[str, Sampler] = {
    "DPM Multi": Sampler(solvers.dpm_multistep, _uniform),
    "Euler a": Sampler(solvers.euler_ancestral, _uniform),
    "Euler": Sampler(solvers.euler, _uniform),
    "Heun": Sampler(solvers.heun, _uniform),
    "DPM++ 2M Karras": Sampler(solvers.dpm_multistep, _karras_all),
    "DPM2 a Karras": Sampler(solvers.dpm2_ancestral, _karras_but_one),
    "DPM2 Karras": Sampler(solvers.dpm2, _karras_but_one),
    "LMS": Sampler(solvers.lms, _uniform),
}
PROFILES: Mapping[str, Mapping[str, Sampler]] = {"diffusers": SAMPLERS, "a1111": IN_A1111}


def table(name: str, steps: int, config: Mapping[str, Any], profile: str = "diffusers") -> Table:
    """The sampler's table for a checkpoint with this scheduler config, made at first use and kept.

    Raises CheckpointRefused for a config that the sampler cannot use.
    """
    return _cached(name, steps, frozen(config), profile)


def alphas(config: Mapping[str, Any]) -> torch.Tensor:
    """(T,) float32: the picture's share of the variance at each of the training's timesteps."""
    return Training.of(config).alphas()


def frozen(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A scheduler config as a key of caches."""
    pairs = ((k, tuple(v) if isinstance(v, list) else v) for k, v in config.items())
    return tuple(sorted(pairs))


@lru_cache(maxsize=256)
def _cached(name: str, steps: int, config: tuple[tuple[str, Any], ...], profile: str) -> Table:
    return make(PROFILES[profile][name], steps, dict(config))


def make(sampler: Sampler, steps: int, config: Mapping[str, Any]) -> Table:
    """Run a sampler on basis vectors and keep what it asked of the model."""
    heard = {k: v for k, v in config.items() if k not in sampler.ignores}
    training = Training.of({**sampler.absent, **heard})
    with np.errstate(divide="ignore", invalid="ignore"):  # eps says nothing where alpha is 0
        path = sampler.path(training, steps)
        most = 2 * len(path.timesteps)  # no sampler here asks more than twice a step
        walk = Walk(path, training.prediction_type == "v_prediction", most)
        final = sampler.solve(walk)
    calls, draws = len(walk.times), sum(walk.draws)
    used = np.r_[: 1 + calls, 1 + most : 1 + most + draws]
    rows = np.stack([*walk.inputs, final])[:, used]
    return Table(
        torch.tensor(walk.times, dtype=torch.float32),
        torch.from_numpy(rows.astype(np.float32)),
        tuple(walk.draws),
    )
