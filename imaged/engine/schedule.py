"""The noise of a checkpoint's training, and where on it a sampler steps.

Training mixed a picture with noise in T strengths: x = sqrt(alpha) * clean + sqrt(1 - alpha) * eps,
with alpha[t] falling from nearly 1 to nearly 0. Half of the samplers' papers scale the same x so
that the picture keeps its size: x = clean + sigma * eps, sigma = sqrt((1 - alpha) / alpha).

The training's numbers are float32 as in the reference (diffusers), bit for bit, so that timesteps
that are rounded to whole ones are the same; all that follows from them is float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from imaged.errors import CheckpointRefused

Vector = NDArray[np.float64]

LAST_ALPHA = 2.0**-24  # stands for an alpha of zero where sigma must stay finite
RHO = 7.0  # Karras et al. 2022, table 1


@dataclass(frozen=True)
class Training:
    """What of a checkpoint's scheduler config describes the model, under the config's own names.

    The rest of a config describes a sampler. That is the caller's choice: a config that says
    "Karras" must not change what "Euler" means.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Training:
        """From a scheduler config; raises CheckpointRefused for what no sampler here can use."""
        kept = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        training = cls(**kept)
        if training.prediction_type not in ("epsilon", "v_prediction"):
            raise CheckpointRefused(f"prediction type {training.prediction_type} is not served")
        return training

    def alphas(self) -> torch.Tensor:
        """(T,) float32: the picture's share of the variance after t + 1 steps of noise."""
        alphas = torch.cumprod(1.0 - self._betas(), dim=0)
        return _zero_at_the_end(alphas) if self.rescale_betas_zero_snr else alphas

    def sigmas(self) -> NDArray[np.float32]:
        """(T,) the noise's size beside a picture of full size; rises with t."""
        alphas = self.alphas()
        if self.rescale_betas_zero_snr:
            alphas[-1] = LAST_ALPHA
        sigmas: NDArray[np.float32] = (((1 - alphas) / alphas) ** 0.5).numpy()
        return sigmas

    def _betas(self) -> torch.Tensor:
        """(T,) float32: the share of the variance that step t replaces by noise."""
        steps, low, high = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.trained_betas is not None:
            return torch.tensor(self.trained_betas, dtype=torch.float32)
        if self.beta_schedule == "linear":
            return torch.linspace(low, high, steps, dtype=torch.float32)
        if self.beta_schedule == "scaled_linear":
            return torch.linspace(low**0.5, high**0.5, steps, dtype=torch.float32) ** 2
        if self.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, equation 17
            angles = [(t / steps + 0.008) / 1.008 * math.pi / 2 for t in range(steps + 1)]
            bars = [math.cos(angle) ** 2 for angle in angles]
            betas = [min(1 - bar / last, 0.999) for last, bar in pairwise(bars)]
            return torch.tensor(betas, dtype=torch.float32)
        raise CheckpointRefused(f"noise schedule {self.beta_schedule} is not served")

    def timesteps(self, steps: int, *, whole: bool = False, ahead: bool = False) -> Vector:
        """(steps,) falling: where sampling calls the model.

        whole: only the training's own timesteps. ahead: one step more is laid out and the last
        is left out, as solvers do that have their own way to the end.
        """
        count, laid = self.num_train_timesteps, steps + ahead
        if self.timestep_spacing == "linspace":
            spaced = np.linspace(0, count - 1, laid)[::-1][:steps]
            return spaced.round() if whole or ahead else spaced
        if self.timestep_spacing == "leading":
            return np.arange(laid)[::-1][:steps] * (count // laid) + np.float64(self.steps_offset)
        if self.timestep_spacing == "trailing":
            # Rounding may make one too many, at -1: of 61 steps, say. The reference takes it.
            return np.arange(count, 0, -count / steps).round()[:steps] - 1
        raise CheckpointRefused(f"timestep spacing {self.timestep_spacing} is not served")


def _zero_at_the_end(alphas: torch.Tensor) -> torch.Tensor:
    """Lin et al. 2024, algorithm 1: the same schedule, scaled so that it ends in noise alone.

    By way of the betas, as the reference has it, for the sake of the last bit.
    """
    roots = alphas.sqrt()
    scaled = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    alphas = scaled**2
    betas = 1 - torch.cat([alphas[:1], alphas[1:] / alphas[:-1]])
    return torch.cumprod(1.0 - betas, dim=0)


@dataclass(frozen=True)
class Path:
    """Where one sampler steps.

    timesteps: (N,) falling. sigmas: (N + 1,) falling, the last is 0. start: the size of the initial
    noise. stride: timesteps in a step of DDIM. alphas, log_sigmas: (T,) of the training.
    """

    timesteps: Vector
    sigmas: Vector
    start: float
    stride: int
    alphas: Vector
    log_sigmas: Vector

    def alpha(self, time: float) -> float:
        """At a whole timestep; before the first it is the first's, never 1."""
        return float(self.alphas[max(int(time), 0)])

    def time_of(self, sigma: float) -> float:
        """The timestep of this much noise, between two of the training's if need be."""
        return float(_times(np.array([sigma]), self.log_sigmas)[0])


def on_alphas(training: Training, steps: int) -> Path:
    """For samplers that are written in alphas; raises CheckpointRefused for more steps than T."""
    times, table = training.timesteps(steps, whole=True), training.sigmas()
    if steps > training.num_train_timesteps or times.max() >= len(table):
        raise CheckpointRefused(f"its training has too few timesteps for {steps} steps")
    return _path(training, steps, times, _at(times, table), 1.0)


def on_sigmas(training: Training, steps: int, *, karras: bool = False) -> Path:
    """For samplers that are written in sigmas."""
    times, table = training.timesteps(steps), training.sigmas()
    sigmas = _at(times, table)
    if karras:
        sigmas = _karras(sigmas[-1], sigmas[0], steps)
        times = _times(sigmas, np.log(table)).round()
    most = float(sigmas.max())
    # Where steps do not begin in noise alone, the first input is the noise at its own size.
    begins = training.timestep_spacing in ("linspace", "trailing")
    return _path(training, steps, times, sigmas, most if begins else math.hypot(most, 1.0))


def on_lambdas(training: Training, steps: int, *, karras: bool = False) -> Path:
    """For samplers that are written in lambda = -log(sigma); their first input is the noise."""
    table = training.sigmas()
    if karras:
        sigmas = _karras(table[0], table[-1], steps)
        times = _times(sigmas, np.log(table))
        # The reference cuts what it has not rounded.
        cut = training.beta_schedule == "squaredcos_cap_v2"
        times = np.floor(times) if cut else times.round()
    else:
        times = training.timesteps(steps, whole=True, ahead=True)
        sigmas = _at(times, table)
    return _path(training, steps, times, sigmas, math.hypot(sigmas[0], 1.0))


def on_k_sigmas(
    training: Training, steps: int, *, karras: bool = False, drop: bool = False
) -> Path:
    """Where k-diffusion's samplers step as A1111 runs them: over all of the training, whatever the
    checkpoint's config says, at timesteps that are not rounded.

    drop: one step more is laid out and the last but one left out, which is A1111's way with DPM2.
    """
    table, laid = training.sigmas().astype(float), steps + drop
    if karras:
        sigmas = _karras(table[0], table[-1], laid)
    else:
        sigmas = np.exp(_at(np.linspace(len(table) - 1, 0, laid), np.log(table)))
    sigmas = sigmas[:steps]
    return _path(training, steps, _times(sigmas, np.log(table)), sigmas, float(sigmas[0]))


def _path(training: Training, steps: int, times: Vector, sigmas: Vector, start: float) -> Path:
    return Path(
        times,
        np.append(sigmas, 0.0),
        start,
        training.num_train_timesteps // steps,
        training.alphas().double().numpy(),
        np.log(training.sigmas()).astype(float),
    )


def _at(times: Vector, table: NDArray[Any]) -> Vector:
    """(N,) a quantity of the training, also between two timesteps."""
    between: Vector = np.interp(times, np.arange(len(table)), table)
    return between


def _karras(least: float, most: float, steps: int) -> Vector:
    """(steps,) falling: Karras et al. 2022, equation 5."""
    ends = float(most) ** (1 / RHO), float(least) ** (1 / RHO)
    spaced: Vector = (ends[0] + np.linspace(0, 1, steps) * (ends[1] - ends[0])) ** RHO
    return spaced


def _times(sigmas: Vector, log_sigmas: NDArray[Any]) -> Vector:
    """(N,) timesteps of sigmas, linear in their logarithm between the training's."""
    logs = np.log(np.maximum(sigmas, 1e-10))
    between: Vector = np.interp(logs, log_sigmas, np.arange(len(log_sigmas)))
    return between
