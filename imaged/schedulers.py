"""The thirteen schedulers' names, and how often each asks the UNet."""

from __future__ import annotations

import re
from collections.abc import Mapping

SCHEDULERS = (
    "DDIM",
    "DPM Multi",
    "DPM Single",
    "Euler a",
    "Euler",
    "Heun",
    "DPM++ 2M Karras",
    "DPM2 a Karras",
    "DPM2 Karras",
    "LMS",
    "PNDM",
    "DDPM",
    "UniPC",
)
#: Other names of the same: classes of diffusers, k-diffusion's and those of other services. A name
#: that means another schedule of noise elsewhere is none of these.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "DDIM": ("DDIMScheduler",),
    "DPM Multi": ("DPM++ 2M", "DPMSolverMultistep", "DPMSolverMultistepScheduler", "k_dpmpp_2m"),
    "DPM Single": ("DPMSolverSinglestep", "DPMSolverSinglestepScheduler"),
    "Euler a": ("EulerAncestralDiscrete", "EulerAncestralDiscreteScheduler", "k_euler_a"),
    "Euler": ("EulerDiscrete", "EulerDiscreteScheduler", "k_euler"),
    "Heun": ("HeunDiscrete", "HeunDiscreteScheduler", "k_heun"),
    "DPM++ 2M Karras": ("KarrasDPM", "k_dpmpp_2m_ka", "dpmpp_2m_k"),
    "DPM2 a Karras": ("DPM2 ancestral Karras", "k_dpm_2_a_ka", "kdpm_2_a_k"),
    "DPM2 Karras": ("k_dpm_2_ka", "kdpm_2_k"),
    "LMS": ("LMSDiscrete", "LMSDiscreteScheduler", "k_lms"),
    "PNDM": ("PNDMScheduler", "PLMS"),
    "DDPM": ("DDPMScheduler",),
    "UniPC": ("UniPCMultistep", "UniPCMultistepScheduler"),
}
#: Those that A1111 has from k-diffusion.
IN_A1111 = (
    "DPM Multi",
    "Euler a",
    "Euler",
    "Heun",
    "DPM++ 2M Karras",
    "DPM2 a Karras",
    "DPM2 Karras",
    "LMS",
)
#: The class of diffusers that each is.
CLASSES: Mapping[str, str] = {
    name: next((n for n in ALIASES[name] if n.endswith("Scheduler")), "") for name in SCHEDULERS
} | {
    "DPM++ 2M Karras": "DPMSolverMultistepScheduler",
    "DPM2 a Karras": "KDPM2AncestralDiscreteScheduler",
    "DPM2 Karras": "KDPM2DiscreteScheduler",
}
#: By profile, how far a scheduler's coefficients are from the reference's at most, relative to the
#: largest in a row; tests hold them to it at 20, 25, 50 and 100 steps.
PARITY: Mapping[str, float] = {"diffusers": 5e-7, "a1111": 3e-6}
TWO_CALLS = frozenset({"Heun", "DPM2 a Karras", "DPM2 Karras"})  # second order: 2N - 1 calls


def unet_calls(scheduler: str, steps: int) -> int:
    """Calls of the UNet for one picture: Heun and DPM2 ask twice a step, PNDM once more."""
    if scheduler in TWO_CALLS:
        return 2 * steps - 1
    return steps + 1 if scheduler == "PNDM" else steps


def step_of_call(scheduler: str, call: int) -> int:
    """Which step a call of the UNet belongs to, both counted from 0."""
    if scheduler in TWO_CALLS:
        return call // 2
    return max(call - 1, 0) if scheduler == "PNDM" else call


def calls_before(scheduler: str, step: int) -> int:
    """UNet calls of the steps before this one, which is not the first."""
    return 2 * step if scheduler in TWO_CALLS else step + (scheduler == "PNDM")


def key(name: str) -> str:
    """A name as it is compared: cases, spaces and how they are written make no difference."""
    bare = re.sub(r"[\s_-]+", "", name.casefold()).removeprefix("sample")
    return bare.replace("++", "pp").replace("eulerancestral", "eulera")
