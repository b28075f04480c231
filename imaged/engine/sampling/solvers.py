"""The thirteen samplers' mathematics, each as its paper has it.

A sampler asks a Walk for the initial noise, the model's outputs and fresh noise, combines them and
returns the final latent. Samplers in alphas hold x = sqrt(alpha) * clean + sqrt(1 - alpha) * eps,
those in sigmas x = clean + sigma * eps; the model's input is the first in any case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from imaged.sampling.noise_schedule import StepPath

Vector = NDArray[np.float64]


@dataclass
class Walk:
    """One run of a sampler along a path, on basis vectors instead of latents.

    A vector (W,) holds coefficients: place 0 is the initial unit noise, places 1 to `calls` the
    model's outputs, the rest fresh unit noises. `inputs` and `times` are what the model was asked,
    `draws` how many fresh noises came after each call.
    """

    path: StepPath
    velocity: bool  # the model gives sqrt(alpha) * eps - sqrt(1 - alpha) * clean and not eps
    calls: int  # as many as there may be
    inputs: list[Vector] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    draws: list[int] = field(default_factory=list)

    def start(self) -> Vector:
        """The initial noise."""
        return self.path.start * self._unit(0)

    def noise(self) -> Vector:
        """A fresh unit noise."""
        self.draws[-1] += 1
        return self._unit(self.calls + sum(self.draws))

    def model(self, x: Vector, time: float) -> Vector:
        """The model's output for an input."""
        self.inputs.append(x)
        self.times.append(time)
        self.draws.append(0)
        return self._unit(len(self.inputs))

    def _unit(self, place: int) -> Vector:
        unit = np.zeros(1 + 2 * self.calls)
        unit[place] = 1
        return unit

    def parts(self, x: Vector, output: Vector, alpha: float) -> tuple[Vector, Vector]:
        """(clean, eps): the model's estimates of image and noise in its input x."""
        signal, noise = alpha**0.5, (1 - alpha) ** 0.5
        if self.velocity:
            return signal * x - noise * output, signal * output + noise * x
        return (x - noise * output) / signal, output

    def predict(self, x: Vector, sigma: float, time: float) -> tuple[Vector, Vector]:
        """(clean, eps) of x = clean + sigma * eps, by one call of the model."""
        alpha = 1 / (sigma**2 + 1)
        x = alpha**0.5 * x
        return self.parts(x, self.model(x, time), alpha)

    @cached_property
    def sigmas(self) -> Vector:
        """(N + 1,) falling to 0."""
        return np.array(self.path.sigmas)

    @property
    def steps(self) -> Iterator[tuple[float, float, float]]:
        """Timestep, sigma, next sigma."""
        return zip(self.path.timesteps, self.sigmas[:-1], self.sigmas[1:], strict=True)


# -- in alphas -----------------------------------------------------------------------------------


def ddim(walk: Walk) -> Vector:
    """Song et al. 2021, equation 12, without fresh noise."""
    x = walk.start()
    for time in walk.path.timesteps:
        x = _transfer(walk, x, walk.model(x, time), time)
    return x


def ddpm(walk: Walk) -> Vector:
    """Ho et al. 2020, equation 7: the mean and the smaller variance, of steps of any length."""
    x, times = walk.start(), walk.path.timesteps
    for i, time in enumerate(times):
        last = i == len(times) - 1
        now, to = walk.path.alpha(time), 1.0 if last else walk.path.alpha(times[i + 1])
        clean, _ = walk.parts(x, walk.model(x, time), now)
        beta = 1 - now / to
        mean = to**0.5 * beta * clean + (now / to) ** 0.5 * (1 - to) * x
        x = mean / (1 - now)
        if time > 0:
            x = x + max((1 - to) / (1 - now) * beta, 1e-20) ** 0.5 * walk.noise()
    return x


def pndm(walk: Walk) -> Vector:
    """Liu et al. 2022, linear multi-step; its first step is Heun's and asks twice."""
    begin, times = walk.start(), walk.path.timesteps
    outputs = [walk.model(begin, times[0])]  # newest first
    x = _transfer(walk, begin, outputs[0], times[0])
    for i, time in enumerate(times[1:]):
        if i == 0:
            mean = (outputs[0] + walk.model(x, time)) / 2
            x = _transfer(walk, begin, mean, time + walk.path.stride)
        outputs = [walk.model(x, time), *outputs[:3]]
        x = _transfer(walk, x, _bashforth(outputs), time)
    return x


def _bashforth(outputs: Sequence[Vector]) -> Vector:
    """Adams and Bashforth's mean of the two to four latest outputs, newest first."""
    weights = ((36, -12), (46, -32, 10), (55, -59, 37, -9))[len(outputs) - 2]
    mean: Vector = np.tensordot(weights, outputs, axes=1) / 24
    return mean


def _transfer(walk: Walk, x: Vector, output: Vector, time: float) -> Vector:
    """DDIM's step: from `time` one stride on, by this output's clean and eps."""
    clean, eps = walk.parts(x, output, walk.path.alpha(time))
    alpha = walk.path.alpha(time - walk.path.stride)
    return math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * eps


# -- in sigmas: dx / dsigma = eps ----------------------------------------------------------------


def euler(walk: Walk) -> Vector:
    """Karras et al. 2022, algorithm 1 without its second half."""
    x = walk.start()
    for time, sigma, to in walk.steps:
        _, eps = walk.predict(x, sigma, time)
        x = x + (to - sigma) * eps
    return x


def euler_ancestral(walk: Walk) -> Vector:
    """Euler's step to less noise than wanted, and fresh noise for the difference."""
    x = walk.start()
    for time, sigma, to in walk.steps:
        down, up = _ancestral(sigma, to)
        _, eps = walk.predict(x, sigma, time)
        x = x + (down - sigma) * eps + up * walk.noise()
    return x


def heun(walk: Walk) -> Vector:
    """Karras et al. 2022, algorithm 1: the mean of both ends' slopes."""
    x = walk.start()
    for (time, sigma, to), next_time in zip(walk.steps, [*walk.path.timesteps[1:], 0], strict=True):
        _, eps = walk.predict(x, sigma, time)
        if to > 0:
            _, ahead = walk.predict(x + (to - sigma) * eps, to, next_time)
            eps = (eps + ahead) / 2
        x = x + (to - sigma) * eps
    return x


def dpm2(walk: Walk) -> Vector:
    """Lu et al. 2022 (DPM-Solver), algorithm 1: the slope half way."""
    x = walk.start()
    for time, sigma, to in walk.steps:
        x = x + (to - sigma) * _half_way(walk, x, sigma, to, time)
    return x


def dpm2_ancestral(walk: Walk) -> Vector:
    """The same to less noise than wanted, and fresh noise for the difference."""
    x = walk.start()
    for time, sigma, to in walk.steps:
        down, up = _ancestral(sigma, to)
        x = x + (down - sigma) * _half_way(walk, x, sigma, down, time)
        if to > 0:
            x = x + up * walk.noise()
    return x


def lms(walk: Walk) -> Vector:
    """Adams and Bashforth's method of order four over uneven sigmas."""
    x, sigmas = walk.start(), walk.sigmas
    slopes: list[Vector] = []  # newest first
    for i, (time, sigma, to) in enumerate(walk.steps):
        slopes = [walk.predict(x, sigma, time)[1], *slopes[:3]]
        nodes = sigmas[i::-1][: len(slopes)]
        x = x + sum(_lagrange(nodes, k, sigma, to) * slope for k, slope in enumerate(slopes))
    return x


def _ancestral(sigma: float, to: float) -> tuple[float, float]:
    """How far down to step and how much noise to add, to keep `to` in all."""
    return to**2 / sigma, to * (1 - (to / sigma) ** 2) ** 0.5


def _half_way(walk: Walk, x: Vector, sigma: float, to: float, time: float) -> Vector:
    """The slope at the geometric mean of two sigmas; towards 0 the slope where x is."""
    _, eps = walk.predict(x, sigma, time)
    middle = (sigma * to) ** 0.5
    if middle > 0:
        _, eps = walk.predict(x + (middle - sigma) * eps, middle, walk.path.time_of(middle))
    return eps


def _lagrange(nodes: Vector, k: int, begin: float, end: float) -> float:
    """Integral of the polynomial that is 1 at node k and 0 at the up to three others.

    By Gauss's rule with two points, which is exact for cubics.
    """
    points = (begin + end) / 2 + (end - begin) / 2 * np.array([[-1], [1]]) / 3**0.5
    others = np.delete(nodes, k)
    values = ((points - others) / (nodes[k] - others)).prod(axis=1)
    return float(values.mean() * (end - begin))


# -- in sigmas: steps in lambda = -log(sigma), exact where clean does not change -----------------


def dpm_multistep(walk: Walk) -> Vector:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2; first and last step of order one."""
    x, cleans = walk.start(), list[Vector]()
    for i, (time, sigma, to) in enumerate(walk.steps):
        cleans.append(walk.predict(x, sigma, time)[0])
        x = _towards(_ahead(cleans, walk.sigmas, i), x, to / sigma)
    return x


def dpm_singlestep(walk: Walk) -> Vector:
    """Lu et al. 2022 (DPM-Solver++), algorithm 1: every second step goes from the one before.

    The last step is of order one, with an even number of steps the last two.
    """
    x, count = walk.start(), len(walk.path.timesteps)
    lambdas = -np.log(walk.sigmas[:-1])
    begin, first = x, x
    for i, (time, sigma, to) in enumerate(walk.steps):
        clean, _ = walk.predict(x, sigma, time)
        if i % 2 == 1 and i < count - 1:
            share = (lambdas[i] - lambdas[i - 1]) / (lambdas[i + 1] - lambdas[i - 1])
            guess = first + (clean - first) / (2 * share)
            x = _towards(guess, begin, to / walk.sigmas[i - 1])
        else:
            begin, first = x, clean
            x = _towards(clean, x, to / sigma)
    return x


def unipc(walk: Walk) -> Vector:
    """Zhao et al. 2023, UniPC-2 with B_2: DPM-Solver++'s step, corrected after each call."""
    x, sigmas, cleans = walk.start(), walk.sigmas, list[Vector]()
    begin = x
    for i, (time, sigma, to) in enumerate(walk.steps):
        cleans.append(walk.predict(x, sigma, time)[0])
        if i > 0:
            x = _towards(_corrected(cleans, sigmas, i), begin, sigma / sigmas[i - 1])
        begin = x
        x = _towards(_ahead(cleans, sigmas, i), x, to / sigma)
    return x


def _towards(clean: Vector, x: Vector, ratio: float) -> Vector:
    """From sigma to ratio * sigma, exact if clean stays what it is."""
    return ratio * x + (1 - ratio) * clean


def _ahead(cleans: Sequence[Vector], sigmas: Vector, i: int) -> Vector:
    """Clean half way (in lambda) through step i, from the last two; the last step takes one."""
    if i == 0 or sigmas[i + 1] == 0:
        return cleans[i]
    before, now, to = np.log(sigmas[i - 1 : i + 2])
    guess: Vector = cleans[i] + (cleans[i] - cleans[i - 1]) * (now - to) / (before - now) / 2
    return guess


def _corrected(cleans: Sequence[Vector], sigmas: Vector, i: int) -> Vector:
    """The mean of clean over step i - 1, now that its end is known too."""
    old, new = cleans[i - 1], cleans[i]
    if i == 1:
        return (old + new) / 2
    before, begin, end = np.log(sigmas[i - 2 : i + 1])
    h = end - begin  # in sigmas' logarithm, so below 0
    ratio = (before - begin) / h
    phi_1 = np.expm1(h)
    phi_2 = phi_1 / h - 1
    phi_3 = phi_2 / h - 1 / 2
    first, second = phi_2 / phi_1, 2 * phi_3 / phi_1
    bend = (first - second) / (1 - ratio)
    mean: Vector = old + bend * (cleans[i - 2] - old) / ratio + (first - bend) * (new - old)
    return mean
