"""The thirteen schedulers: names, where they step, and how many UNet calls they make."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from imaged.sampling.noise_schedule import Steps, on_alphas, on_k_sigmas, on_lambdas, on_sigmas


@dataclass(frozen=True)
class Scheduler:
    """What is known of one scheduler, but for its solver (engine/sampling/tables.py).

    aliases:   other names of the same: classes of diffusers, k-diffusion's and other services'. A
               name that means another noise schedule elsewhere is not among them.
    diffusers: its class there.
    steps:     where it steps, as that class does, also for keys that a config lacks.
    a1111:     where it steps in A1111, which has it from k-diffusion; None if A1111 has it not.
    calls:     UNet calls of one step. extra: calls of the first step beyond that.
    """

    name: str
    aliases: tuple[str, ...]
    diffusers: str
    steps: Steps
    a1111: Steps | None = None
    calls: int = 1
    extra: int = 0


_LEADING = {"timestep_spacing": "leading"}
_SDXL_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_SNR = ("rescale_betas_zero_snr",)
_SPACING = ("timestep_spacing", "steps_offset")
_K = Steps(on_k_sigmas)
_K_KARRAS = Steps(partial(on_k_sigmas, karras=True))
_K_KARRAS_BUT_ONE = Steps(partial(on_k_sigmas, karras=True, drop=True))
_KARRAS = Steps(partial(on_sigmas, karras=True), _SDXL_BETAS, _SNR)

TABLE = (
    Scheduler("DDIM", ("DDIMScheduler",), "DDIMScheduler", Steps(on_alphas, _LEADING)),
    Scheduler(
        "DPM Multi",
        ("DPM++ 2M", "DPMSolverMultistep", "DPMSolverMultistepScheduler", "k_dpmpp_2m"),
        "DPMSolverMultistepScheduler",
        Steps(on_lambdas),
        _K,
    ),
    Scheduler(
        "DPM Single",
        ("DPMSolverSinglestep", "DPMSolverSinglestepScheduler"),
        "DPMSolverSinglestepScheduler",
        Steps(on_lambdas, ignores=_SNR + _SPACING),
    ),
    Scheduler(
        "Euler a",
        ("EulerAncestralDiscrete", "EulerAncestralDiscreteScheduler", "k_euler_a"),
        "EulerAncestralDiscreteScheduler",
        Steps(on_sigmas),
        _K,
    ),
    Scheduler(
        "Euler",
        ("EulerDiscrete", "EulerDiscreteScheduler", "k_euler"),
        "EulerDiscreteScheduler",
        Steps(on_sigmas),
        _K,
    ),
    Scheduler(
        "Heun",
        ("HeunDiscrete", "HeunDiscreteScheduler", "k_heun"),
        "HeunDiscreteScheduler",
        Steps(on_sigmas, _SDXL_BETAS, _SNR),
        _K,
        calls=2,
    ),
    Scheduler(
        "DPM++ 2M Karras",
        ("KarrasDPM", "k_dpmpp_2m_ka", "dpmpp_2m_k"),
        "DPMSolverMultistepScheduler",
        Steps(partial(on_lambdas, karras=True)),
        _K_KARRAS,
    ),
    Scheduler(
        "DPM2 a Karras",
        ("DPM2 ancestral Karras", "k_dpm_2_a_ka", "kdpm_2_a_k"),
        "KDPM2AncestralDiscreteScheduler",
        _KARRAS,
        _K_KARRAS_BUT_ONE,
        calls=2,
    ),
    Scheduler(
        "DPM2 Karras",
        ("k_dpm_2_ka", "kdpm_2_k"),
        "KDPM2DiscreteScheduler",
        _KARRAS,
        _K_KARRAS_BUT_ONE,
        calls=2,
    ),
    Scheduler(
        "LMS",
        ("LMSDiscrete", "LMSDiscreteScheduler", "k_lms"),
        "LMSDiscreteScheduler",
        Steps(on_sigmas, ignores=_SNR),
        _K,
    ),
    Scheduler(
        "PNDM",
        ("PNDMScheduler", "PLMS"),
        "PNDMScheduler",
        Steps(on_alphas, _LEADING, _SNR),
        extra=1,
    ),
    Scheduler("DDPM", ("DDPMScheduler",), "DDPMScheduler", Steps(on_alphas, _LEADING)),
    Scheduler(
        "UniPC",
        ("UniPCMultistep", "UniPCMultistepScheduler"),
        "UniPCMultistepScheduler",
        Steps(on_lambdas),
    ),
)
_BY_NAME = {scheduler.name: scheduler for scheduler in TABLE}
SCHEDULERS = tuple(_BY_NAME)
ALIASES: Mapping[str, tuple[str, ...]] = {s.name: s.aliases for s in TABLE}
CLASSES: Mapping[str, str] = {s.name: s.diffusers for s in TABLE}
IN_A1111 = tuple(s.name for s in TABLE if s.a1111)
#: Where schedulers step, by profile and name.
STEPS: Mapping[str, Mapping[str, Steps]] = {
    "diffusers": {s.name: s.steps for s in TABLE},
    "a1111": {s.name: s.a1111 for s in TABLE if s.a1111},
}
#: By profile, how far a scheduler's coefficients are from the reference's at most, relative to the
#: largest in a row; tests hold them to it at 20, 25, 50 and 100 steps.
PARITY: Mapping[str, float] = {"diffusers": 5e-7, "a1111": 3e-6}


def unet_calls(scheduler: str, steps: int) -> int:
    """UNet calls of one image. Those with two calls a step (Heun, DPM2) have one in the last."""
    found = _BY_NAME[scheduler]
    return found.calls * (steps - 1) + 1 + found.extra


def step_of_call(scheduler: str, call: int) -> int:
    """The step that a UNet call belongs to, both counted from 0."""
    found = _BY_NAME[scheduler]
    return max(call - found.extra, 0) // found.calls


def calls_before(scheduler: str, step: int) -> int:
    """UNet calls of the first `step` steps, of which there is at least one."""
    found = _BY_NAME[scheduler]
    return found.calls * step + found.extra


def normalized(name: str) -> str:
    """A name normalized for comparison: case, spaces and spellings make no difference."""
    bare = re.sub(r"[\s_-]+", "", name.casefold()).removeprefix("sample")
    return bare.replace("++", "pp").replace("eulerancestral", "eulera")
