"""Tables against the schedulers' own loops, for all thirteen; the tolerance is 3e-6 relative."""

import inspect
import json
from typing import Any

import diffusers as d
import pytest
import torch

from imaged.catalogue import MICRO
from imaged.engine import samplers
from imaged.engine.samplers import CLASSES, build_scheduler, table
from imaged.params import SCHEDULERS, unet_calls

CONFIG = json.loads((MICRO / "scheduler" / "scheduler_config.json").read_text())
SHAPE = (1, 4, 8, 8)


def reference(name: str) -> Any:
    """Each sampler as people who call the reference library write it, on SDXL's config."""
    sdxl = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    karras = {**sdxl, "use_karras_sigmas": True}
    unspaced = {k: v for k, v in sdxl.items() if k not in ("timestep_spacing", "steps_offset")}
    schedulers: dict[str, Any] = {
        "DDIM": lambda: d.DDIMScheduler(**sdxl, clip_sample=False, set_alpha_to_one=False),
        "DPM Multi": lambda: d.DPMSolverMultistepScheduler(**sdxl),
        "DPM Single": lambda: d.DPMSolverSinglestepScheduler(**unspaced, lower_order_final=True),
        "Euler a": lambda: d.EulerAncestralDiscreteScheduler(**sdxl),
        "Euler": lambda: d.EulerDiscreteScheduler(**sdxl),
        "Heun": lambda: d.HeunDiscreteScheduler(**sdxl),
        "DPM++ 2M Karras": lambda: d.DPMSolverMultistepScheduler(**karras),
        "DPM2 a Karras": lambda: d.KDPM2AncestralDiscreteScheduler(**karras),
        "DPM2 Karras": lambda: d.KDPM2DiscreteScheduler(**karras),
        "LMS": lambda: d.LMSDiscreteScheduler(**sdxl),
        "PNDM": lambda: d.PNDMScheduler(**sdxl, skip_prk_steps=True, set_alpha_to_one=False),
        "DDPM": lambda: d.DDPMScheduler(**sdxl, clip_sample=False),
        "UniPC": lambda: d.UniPCMultistepScheduler(**sdxl),
    }
    return schedulers[name]()


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A stand-in that is neither linear nor constant in time."""
    return torch.tanh(0.3 * x) + 0.1 * x + float(t) / 1000


def by_loop(name: str, steps: int, seed: int) -> torch.Tensor:
    scheduler = reference(name)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    takes = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if takes else {}
    for t in scheduler.timesteps:
        out = model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, return_dict=False, **options)[0]
    return x


def by_table(name: str, steps: int, seed: int) -> torch.Tensor:
    traced = table(name, steps, CONFIG)
    generator = torch.Generator().manual_seed(seed)
    history = torch.zeros(traced.rows.shape[1], *SHAPE)
    history[0] = torch.randn(SHAPE, generator=generator)
    drawn = 1 + traced.calls
    for i in range(traced.calls):
        x = torch.tensordot(traced.rows[i], history, dims=1)
        history[1 + i] = model(x, traced.timesteps[i])
        for _ in range(traced.draws[i]):
            history[drawn] = torch.randn(SHAPE, generator=generator)
            drawn += 1
    return torch.tensordot(traced.rows[-1], history, dims=1)


@pytest.mark.parametrize("steps", [20, 25, 50, 100])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_table_equals_loop(name: str, steps: int) -> None:
    ours, theirs = by_table(name, steps, 5), by_loop(name, steps, 5)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 3e-6


@pytest.mark.parametrize("steps", [20, 25, 50, 100])
def test_calls_are_as_priced(steps: int) -> None:
    for name in SCHEDULERS:
        assert table(name, steps, CONFIG).calls == unet_calls(name, steps)


def test_every_name_has_a_class() -> None:
    assert set(CLASSES) == set(SCHEDULERS)


def test_rows_use_only_what_is_known() -> None:
    for name in SCHEDULERS:
        traced = table(name, 20, CONFIG)
        drawn = 0
        for i in range(traced.calls):
            row = traced.rows[i]
            assert not row[1 + i : 1 + traced.calls].any()  # outputs still to come
            assert not row[1 + traced.calls + drawn :].any()  # noises still to come
            drawn += traced.draws[i]


def test_no_leak_between_names() -> None:
    plain = build_scheduler("Euler", CONFIG)
    build_scheduler("DPM2 Karras", CONFIG)
    again = build_scheduler("Euler", CONFIG)
    assert dict(plain.config) == dict(again.config)
    assert not again.config.use_karras_sigmas


def test_a_config_that_is_kept_from_another_request_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mutant: one scheduler config for all, as the last request left it."""
    build, left = samplers.build_scheduler, dict(CONFIG)

    def stale(name: str, config: Any) -> Any:
        scheduler = type(build(name, CONFIG)).from_config({**left, **CLASSES[name][1]})
        left.update(scheduler.config)
        left.pop("_use_default_values", None)
        return scheduler

    monkeypatch.setattr(samplers, "build_scheduler", stale)
    samplers._cached.cache_clear()
    by_table("DPM++ 2M Karras", 20, 5)
    ours, theirs = by_table("Euler", 20, 5), by_loop("Euler", 20, 5)
    samplers._cached.cache_clear()
    assert float((ours - theirs).abs().max() / theirs.abs().max()) > 1e-3


def test_a_config_does_not_choose_the_sampler() -> None:
    loud = {
        **CONFIG,
        "use_karras_sigmas": True,
        "use_beta_sigmas": True,
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
    }
    for name in SCHEDULERS:
        assert torch.equal(table(name, 20, loud).rows, table(name, 20, CONFIG).rows), name
    other = {**CONFIG, "timestep_spacing": "trailing"}
    assert not torch.equal(table("Euler", 20, other).rows, table("Euler", 20, CONFIG).rows)
