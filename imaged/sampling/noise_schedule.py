"""The noise of a checkpoint's training, and where on it a sampler steps.

Training mixed a picture with noise in T strengths: x = sqrt(alpha) * clean + sqrt(1 - alpha) * eps,
with alpha[t] falling from nearly 1 to nearly 0. Half of the samplers' papers scale the same x so
that the picture keeps its size: x = clean + sigma * eps, sigma = sqrt((1 - alpha) / alpha).

The training's numbers are float32 as in the reference (diffusers), rounded where it rounds, so that
timesteps that are rounded to whole ones are the same; all that follows from them is float64. Plain
Python floats, so that the gateway need not import torch.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import accumulate, pairwise
from operator import mul
from typing import Any

from imaged.errors import CheckpointRefused

Numbers = Sequence[float]

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
        if kept.get("trained_betas") is not None:
            kept["trained_betas"] = tuple(kept["trained_betas"])
        training = cls(**kept)
        if training.prediction_type not in ("epsilon", "v_prediction"):
            raise CheckpointRefused(f"prediction type {training.prediction_type} is not served")
        return training

    @property
    def alphas(self) -> Numbers:
        """(T,) the picture's share of the variance after t + 1 steps of noise; the reference's
        alphas_cumprod.
        """
        return _alphas(self)

    @property
    def sigmas(self) -> Numbers:
        """(T,) the noise's size beside a picture of full size; rises with t."""
        return _sigmas(self)

    def betas(self) -> Numbers:
        """(T,) the share of the variance that step t replaces by noise."""
        steps, low, high = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.trained_betas is not None:
            return _float32(self.trained_betas)
        if self.beta_schedule == "linear":
            return _linspace_float32(low, high, steps)
        if self.beta_schedule == "scaled_linear":
            return _float32(root * root for root in _linspace_float32(low**0.5, high**0.5, steps))
        if self.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, equation 17
            angles = [(t / steps + 0.008) / 1.008 * math.pi / 2 for t in range(steps + 1)]
            bars = [math.cos(angle) ** 2 for angle in angles]
            return _float32(min(1 - bar / last, 0.999) for last, bar in pairwise(bars))
        raise CheckpointRefused(f"noise schedule {self.beta_schedule} is not served")

    def timesteps(self, steps: int, *, whole: bool = False, ahead: bool = False) -> Numbers:
        """(steps,) falling: where sampling calls the model.

        whole: only the training's own timesteps. ahead: one step more is laid out and the last
        is left out, as solvers do that have their own way to the end; with "trailing" it has no
        effect, with "linspace" it rounds too.
        """
        count, laid = self.num_train_timesteps, steps + ahead
        if self.timestep_spacing == "linspace":
            spaced = _linspace(0, count - 1, laid)[::-1][:steps]
            return [float(round(t)) for t in spaced] if whole or ahead else spaced
        if self.timestep_spacing == "leading":
            stride = count // laid
            return [float(i * stride + self.steps_offset) for i in range(laid)][::-1][:steps]
        if self.timestep_spacing == "trailing":
            # Of some counts, such as 61, the last is -1, as in the reference, whose float error the
            # difference below has too.
            gap = count - (count - count / steps)
            return [float(round(count - i * gap)) - 1 for i in range(steps)]
        raise CheckpointRefused(f"timestep spacing {self.timestep_spacing} is not served")


@dataclass(frozen=True)
class StepPath:
    """Where one sampler steps.

    timesteps: (N,) falling. sigmas: (N + 1,) falling, the last is 0. start: the size of the initial
    noise. stride: timesteps in a step of DDIM.
    """

    training: Training
    timesteps: Numbers
    sigmas: Numbers
    start: float
    stride: int

    def alpha(self, time: float) -> float:
        """At a whole timestep; before the first it is the first's, never 1."""
        return self.training.alphas[max(int(time), 0)]

    def time_of(self, sigma: float) -> float:
        """The timestep of this much noise, between two of the training's if need be."""
        return _time(sigma, _logs(self.training))


def on_alphas(training: Training, steps: int) -> StepPath:
    """For samplers that are written in alphas; raises CheckpointRefused for more steps than T."""
    times, table = training.timesteps(steps, whole=True), training.sigmas
    if steps > training.num_train_timesteps or max(times) >= len(table):
        raise CheckpointRefused(f"its training has too few timesteps for {steps} steps")
    return _path(training, times, [_interpolated(t, table) for t in times], 1.0)


def on_sigmas(training: Training, steps: int, *, karras: bool = False) -> StepPath:
    """For samplers that are written in sigmas."""
    times, table = training.timesteps(steps), training.sigmas
    sigmas: Numbers = [_interpolated(t, table) for t in times]
    if karras:
        sigmas = _karras(sigmas[-1], sigmas[0], steps)
        times = [float(round(_time(sigma, _logs(training)))) for sigma in sigmas]
    most = max(sigmas)
    # Where steps do not begin in noise alone, the first input is the noise at its own size.
    begins = training.timestep_spacing in ("linspace", "trailing")
    return _path(training, times, sigmas, most if begins else math.hypot(most, 1.0))


def on_lambdas(training: Training, steps: int, *, karras: bool = False) -> StepPath:
    """For samplers that are written in lambda = -log(sigma); their first input is the noise."""
    table = training.sigmas
    if karras:
        sigmas = _karras(table[0], table[-1], steps)
        # With this schedule the reference truncates instead of rounding.
        cut = math.floor if training.beta_schedule == "squaredcos_cap_v2" else round
        times: Numbers = [float(cut(_time(sigma, _logs(training)))) for sigma in sigmas]
    else:
        times = training.timesteps(steps, whole=True, ahead=True)
        sigmas = [_interpolated(t, table) for t in times]
    return _path(training, times, sigmas, math.hypot(sigmas[0], 1.0))


def on_k_sigmas(
    training: Training, steps: int, *, karras: bool = False, drop: bool = False
) -> StepPath:
    """Where k-diffusion's samplers step as A1111 runs them: over all of the training, whatever the
    checkpoint's config says, at timesteps that are not rounded.

    drop: one step more is laid out and the last but one left out, which is A1111's way with DPM2.
    """
    table, laid = training.sigmas, steps + drop
    logs = [math.log(sigma) for sigma in table]
    if karras:
        sigmas = _karras(table[0], table[-1], laid)
    else:
        sigmas = [math.exp(_interpolated(t, logs)) for t in _linspace(len(table) - 1, 0, laid)]
    sigmas = sigmas[:steps]
    return _path(training, [_time(sigma, logs) for sigma in sigmas], sigmas, sigmas[0])


@dataclass(frozen=True)
class Steps:
    """How a scheduler lays out its steps, and how it reads a checkpoint's config."""

    lay: Callable[[Training, int], StepPath]
    absent: Mapping[str, Any] = field(default_factory=dict)  # what a key means that is not there
    ignores: tuple[str, ...] = ()

    def training(self, config: Mapping[str, Any]) -> Training:
        """The config as this scheduler has it; raises CheckpointRefused."""
        heard = {k: v for k, v in config.items() if k not in self.ignores}
        return Training.of({**self.absent, **heard})

    def path(self, config: Mapping[str, Any], steps: int) -> StepPath:
        """Raises CheckpointRefused for a config that the scheduler cannot use."""
        return self.lay(self.training(config), steps)


# -- the training's numbers, in float32 ----------------------------------------------------------


@lru_cache(maxsize=64)
def _alphas(training: Training) -> Numbers:
    alphas = _products(training.betas())
    return _zero_at_the_end(alphas) if training.rescale_betas_zero_snr else alphas


@lru_cache(maxsize=64)
def _sigmas(training: Training) -> Numbers:
    alphas = list(training.alphas)
    if training.rescale_betas_zero_snr:
        alphas[-1] = LAST_ALPHA
    noises = _float32(1 - alpha for alpha in alphas)
    ratios = _float32(noise / alpha for noise, alpha in zip(noises, alphas, strict=True))
    return _float32(math.sqrt(ratio) for ratio in ratios)


@lru_cache(maxsize=64)
def _logs(training: Training) -> Numbers:
    """(T,) logarithms of the training's sigmas."""
    return _float32(math.log(sigma) for sigma in training.sigmas)


def _zero_at_the_end(alphas: Numbers) -> Numbers:
    """Lin et al. 2024, algorithm 1: the same schedule, scaled so that it ends in noise alone.

    By way of the betas, as the reference has it, for the sake of the last bit.
    """
    roots = _float32(math.sqrt(alpha) for alpha in alphas)
    first, last = roots[0], roots[-1]
    [span] = _float32([first - last])
    [scale] = _float32([first / span])
    scaled = _float32(root * scale for root in _float32(root - last for root in roots))
    alphas = _float32(root * root for root in scaled)
    kept = _float32(to / now for now, to in pairwise(alphas))
    return _products(_float32(1 - share for share in (alphas[0], *kept)))


def _products(betas: Numbers) -> Numbers:
    """(T,) running products of what steps of noise leave; the sum is kept in float64."""
    return _float32(accumulate(_float32(1.0 - beta for beta in betas), mul))


def _linspace_float32(low: float, high: float, count: int) -> Numbers:
    """(count,) evenly, from both ends towards the middle."""
    low, high = _float32([low, high])
    [span] = _float32([high - low])
    [step] = _float32([span / max(count - 1, 1)])
    half = count // 2
    ends = (low + step * i if i < half else high - step * (count - 1 - i) for i in range(count))
    return _float32(ends)


def _float32(values: Iterable[float]) -> Numbers:
    """Rounded to float32."""
    return array("f", values).tolist()


# -- and what follows, in float64 ----------------------------------------------------------------


def _path(training: Training, times: Numbers, sigmas: Numbers, start: float) -> StepPath:
    stride = training.num_train_timesteps // len(times)
    return StepPath(training, tuple(times), (*sigmas, 0.0), start, stride)


def _linspace(begin: float, end: float, count: int) -> Numbers:
    """(count,) evenly, with both ends."""
    step = (end - begin) / max(count - 1, 1)
    return [*(i * step + begin for i in range(count - 1)), float(end if count > 1 else begin)]


def _karras(least: float, most: float, steps: int) -> Numbers:
    """(steps,) falling: Karras et al. 2022, equation 5."""
    begin, end = most ** (1 / RHO), least ** (1 / RHO)
    return [(begin + share * (end - begin)) ** RHO for share in _linspace(0, 1, steps)]


def _interpolated(time: float, table: Numbers) -> float:
    """A quantity of the training, also between two timesteps."""
    if time <= 0:
        return table[0]
    below = int(time)
    if below >= len(table) - 1:
        return table[-1]
    return table[below] + (table[below + 1] - table[below]) * (time - below)


def _time(sigma: float, logs: Numbers) -> float:
    """The timestep of a sigma, linear in its logarithm between the training's."""
    log = math.log(max(sigma, 1e-10))
    if log <= logs[0]:
        return 0.0
    if log >= logs[-1]:
        return len(logs) - 1.0
    below = bisect_right(logs, log) - 1
    return below + (log - logs[below]) / (logs[below + 1] - logs[below])
