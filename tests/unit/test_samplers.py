"""Tables against the schedulers' own loops, for all thirteen; the tolerance is 3e-6 relative."""

import inspect
import json

import pytest
import torch

from imaged.catalogue import MICRO
from imaged.engine.samplers import CLASSES, build_scheduler, table
from imaged.params import SCHEDULERS, unet_calls

CONFIG = json.loads((MICRO / "scheduler" / "scheduler_config.json").read_text())
SHAPE = (1, 4, 8, 8)


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A stand-in that is neither linear nor constant in time."""
    return torch.tanh(0.3 * x) + 0.1 * x + float(t) / 1000


def by_loop(name: str, steps: int, seed: int) -> torch.Tensor:
    scheduler = build_scheduler(name, CONFIG)
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
