"""Each of the thirteen samplers as a table.

With the number of steps fixed, a sampler is a linear function of the initial noise, the UNet's
outputs and the fresh noises it draws. So it runs once on basis vectors instead of images
(solvers.Walk), and what comes out are the coefficients. One row of a table combines what an image
has seen so far into the UNet's next input; the last row gives the final latent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from imaged.engine.sampling import solvers
from imaged.engine.sampling.solvers import Vector, Walk
from imaged.sampling.noise_schedule import Steps, Training
from imaged.sampling.schedulers import STEPS


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

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the whole table: equal digests sample alike."""
        found = hashlib.sha256(repr(self.draws).encode())
        for part in (self.timesteps, self.rows):
            found.update(part.numpy().tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Sampler:
    """A solver, and where it steps."""

    solve: Callable[[Walk], Vector]
    steps: Steps


SOLVERS: dict[str, Callable[[Walk], Vector]] = {
    "DDIM": solvers.ddim,
    "DPM Multi": solvers.dpm_multistep,
    "DPM Single": solvers.dpm_singlestep,
    "Euler a": solvers.euler_ancestral,
    "Euler": solvers.euler,
    "Heun": solvers.heun,
    "DPM++ 2M Karras": solvers.dpm_multistep,
    "DPM2 a Karras": solvers.dpm2_ancestral,
    "DPM2 Karras": solvers.dpm2,
    "LMS": solvers.lms,
    "PNDM": solvers.pndm,
    "DDPM": solvers.ddpm,
    "UniPC": solvers.unipc,
}
PROFILES: Mapping[str, dict[str, Sampler]] = {
    profile: {name: Sampler(SOLVERS[name], steps) for name, steps in by_name.items()}
    for profile, by_name in STEPS.items()
}
SAMPLERS = PROFILES["diffusers"]


def table(name: str, steps: int, config: Mapping[str, Any], profile: str = "diffusers") -> Table:
    """The sampler's table for a checkpoint with this scheduler config, made at first use and kept.

    Raises CheckpointRefused for a config that the sampler cannot use.
    """
    return _cached(name, steps, frozen(config), profile)


def alphas(config: Mapping[str, Any]) -> torch.Tensor:
    """(T,) float32: the picture's share of the variance at each of the training's timesteps."""
    return torch.tensor(Training.of(config).alphas)


def frozen(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A scheduler config as a key of caches."""
    pairs = ((k, tuple(v) if isinstance(v, list) else v) for k, v in config.items())
    return tuple(sorted(pairs))


@lru_cache(maxsize=256)
def _cached(name: str, steps: int, config: tuple[tuple[str, Any], ...], profile: str) -> Table:
    return make(PROFILES[profile][name], steps, dict(config))


def make(sampler: Sampler, steps: int, config: Mapping[str, Any]) -> Table:
    """Run a sampler on basis vectors and keep what it asked of the model."""
    path = sampler.steps.path(config, steps)
    most = 2 * len(path.timesteps)  # no sampler here asks more than twice a step
    walk = Walk(path, path.training.prediction_type == "v_prediction", most)
    with np.errstate(divide="ignore", invalid="ignore"):  # eps says nothing where alpha is 0
        final = sampler.solve(walk)
    calls, draws = len(walk.times), sum(walk.draws)
    used = np.r_[: 1 + calls, 1 + most : 1 + most + draws]
    rows = np.stack([*walk.inputs, final])[:, used]
    return Table(
        torch.tensor(walk.times, dtype=torch.float32),
        torch.from_numpy(rows.astype(np.float32)),
        tuple(walk.draws),
    )
