"""The reference for the profile a1111: k-diffusion's own sampling functions, traced into tables.

Its package asks for far more than its samplers need, so it is no dependency. What they give is kept
in golden/k_diffusion.npz, and this makes it anew from an unpacked copy of the package:

    pip download --no-deps k-diffusion torchsde torchdiffeq trampoline   # and unzip all four
    python -m tests.k_oracle FOLDER
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from imaged.sampling.noise_schedule import Training
from imaged.sampling.schedulers import IN_A1111

GOLDEN = Path(__file__).parent / "golden" / "k_diffusion.npz"
STEPS = (20, 25, 50, 100)
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
#: A1111's function, whether its sigmas are Karras's, and whether the last but one is left out.
FUNCTIONS = {
    "DPM Multi": ("sample_dpmpp_2m", False, False),
    "Euler a": ("sample_euler_ancestral", False, False),
    "Euler": ("sample_euler", False, False),
    "Heun": ("sample_heun", False, False),
    "DPM++ 2M Karras": ("sample_dpmpp_2m", True, False),
    "DPM2 a Karras": ("sample_dpm_2_ancestral", True, True),
    "DPM2 Karras": ("sample_dpm_2", True, True),
    "LMS": ("sample_lms", False, False),
}


def load(folder: Path) -> tuple[Any, Any]:
    """Its modules `sampling` and `external`, without the rest of the package."""
    sys.path.insert(0, str(folder))
    package = ModuleType("k_diffusion")
    package.__path__ = [str(folder / "k_diffusion")]
    sys.modules["k_diffusion"] = package
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = ModuleType(name)
    sys.modules["torchvision.transforms"].functional = None  # type: ignore[attr-defined]
    names = ("k_diffusion.sampling", "k_diffusion.external")
    sampling, external = (importlib.import_module(name) for name in names)
    return sampling, external


def trace(sampling: Any, external: Any, name: str, steps: int) -> tuple[Any, Any]:
    """(timesteps, rows) as in samplers.Table, in float64."""
    function, karras, drop = FUNCTIONS[name]
    width, asked, times, drawn = 1 + 4 * steps, [], [], []

    def unit(place: int) -> torch.Tensor:
        return torch.eye(width, dtype=torch.float64)[place : place + 1]

    class Traced(external.DiscreteEpsDDPMDenoiser):  # type: ignore[misc]
        def get_eps(self, x: torch.Tensor, t: torch.Tensor, **_: Any) -> torch.Tensor:
            asked.append(x[0].numpy())
            times.append(float(t))
            return unit(len(asked))

    def noise(*_: Any) -> torch.Tensor:
        drawn.append(1)
        return unit(2 * steps + len(drawn))

    model = Traced(
        None, torch.tensor(Training.of(SDXL).alphas, dtype=torch.float64), quantize=False
    )
    laid = steps + drop
    least, most = model.sigma_min.item(), model.sigma_max.item()
    sigmas = (
        sampling.get_sigmas_karras(laid, least, most) if karras else model.get_sigmas(laid)
    ).double()
    if drop:
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    given = {"noise_sampler": noise} if "ancestral" in function else {}
    final = getattr(sampling, function)(model, unit(0) * sigmas[0], sigmas, disable=True, **given)
    calls = len(asked)
    used = np.r_[: 1 + calls, 1 + 2 * steps : 1 + 2 * steps + len(drawn)]
    return np.array(times), np.stack([*asked, final[0].numpy()])[:, used]


def main(folder: str) -> None:
    sampling, external = load(Path(folder))
    kept = {}
    for name in IN_A1111:
        for steps in STEPS:
            times, rows = trace(sampling, external, name, steps)
            kept[f"{name}/{steps}/times"] = times.astype(np.float32)
            kept[f"{name}/{steps}/rows"] = rows.astype(np.float32)
    np.savez_compressed(GOLDEN, **kept)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
