"""Tables against diffusers' schedulers, for all thirteen.

Once against the loop that people write around a scheduler on SDXL's config, with a stand-in for
the UNet, to 3e-6 of the largest value; then coefficient by coefficient over many configs, to 3e-6
of the largest in a row.
"""

import inspect
import json
from dataclasses import replace
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch

from imaged.catalogue.model import MICRO
from imaged.engine.sampling import solvers, tables
from imaged.engine.sampling.tables import PROFILES, SAMPLERS, Sampler, Table, alphas, make, table
from imaged.errors import BadParameter, CheckpointRefused
from imaged.params.image_params import read_params
from imaged.sampling import schedulers
from imaged.sampling.schedulers import IN_A1111, PARITY, SCHEDULERS, unet_calls
from tests import k_oracle
from tests.mutants import red
from tests.oracle import CLASSES, build_scheduler, trace
from tests.tolerance import summed

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
    x: torch.Tensor = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    takes = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if takes else {}
    for t in scheduler.timesteps:
        out = model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, return_dict=False, **options)[0]
    return x


def by_table(name: str, steps: int, seed: int) -> torch.Tensor:
    ours = table(name, steps, CONFIG)
    generator = torch.Generator().manual_seed(seed)
    history = torch.zeros(ours.rows.shape[1], *SHAPE)
    history[0] = torch.randn(SHAPE, generator=generator)
    drawn = 1 + ours.calls
    for i in range(ours.calls):
        x = torch.tensordot(ours.rows[i], history, dims=1)
        history[1 + i] = model(x, ours.timesteps[i])
        for _ in range(ours.draws[i]):
            history[drawn] = torch.randn(SHAPE, generator=generator)
            drawn += 1
    last: torch.Tensor = torch.tensordot(ours.rows[-1], history, dims=1)
    return last


@pytest.mark.parametrize("steps", [20, 25, 50, 100])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_table_equals_loop(name: str, steps: int) -> None:
    ours, theirs = by_table(name, steps, 5), by_loop(name, steps, 5)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 3e-6


@pytest.mark.parametrize("steps", [20, 25, 50, 100])
def test_calls_are_as_priced(steps: int) -> None:
    for name in SCHEDULERS:
        assert table(name, steps, CONFIG).calls == unet_calls(name, steps)


def test_every_name_has_a_solver_and_a_class() -> None:
    assert list(SAMPLERS) == list(SCHEDULERS)
    assert {name: kind for name, (kind, _) in CLASSES.items()} == schedulers.CLASSES


def test_rows_use_only_what_is_known() -> None:
    for name in SCHEDULERS:
        ours = table(name, 20, CONFIG)
        drawn = 0
        for i in range(ours.calls):
            row = ours.rows[i]
            assert not row[1 + i : 1 + ours.calls].any()  # outputs still to come
            assert not row[1 + ours.calls + drawn :].any()  # noises still to come
            drawn += ours.draws[i]


def test_no_leak_between_names() -> None:
    plain = make(SAMPLERS["Euler"], 20, CONFIG)
    for name in SCHEDULERS:
        make(SAMPLERS[name], 7, {**CONFIG, "timestep_spacing": "trailing"})
    assert torch.equal(plain.rows, make(SAMPLERS["Euler"], 20, CONFIG).rows)


def test_a_config_that_is_kept_from_another_request_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mutant: one scheduler config for all, as the last request left it."""
    made, left = make, dict[str, Any]()

    def stale(sampler: Sampler, steps: int, config: Any) -> Table:
        result = made(sampler, steps, {**config, **left})
        left.update(config)
        return result

    monkeypatch.setattr(tables, "make", stale)
    tables._cached.cache_clear()
    table("DPM++ 2M Karras", 20, {**CONFIG, "timestep_spacing": "trailing"})
    ours, theirs = by_table("Euler", 20, 5), by_loop("Euler", 20, 5)
    tables._cached.cache_clear()
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


# -- coefficient by coefficient ------------------------------------------------------------------

STEPS = (1, 2, 3, 4, 5, 8, 10, 14, 15, 16, 20, 25, 50, 100)
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACED: list[dict[str, Any]] = [
    {"timestep_spacing": "leading", "steps_offset": 0},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "linspace", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
]
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
# Eps says nothing of the picture where there is nothing but noise.
BLIND = [{**SDXL, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}]
CONFIGS: list[dict[str, Any]] = [
    {},  # each class has defaults of its own
    *({**SDXL, **spaced} for spaced in SPACED),
    *({**SDXL, **spaced, **ZERO_SNR} for spaced in SPACED),
    *({**spaced, "prediction_type": "v_prediction"} for spaced in SPACED),
    *({**spaced, "beta_schedule": "squaredcos_cap_v2"} for spaced in SPACED),
    *BLIND,
    {"trained_betas": [1e-3 + 2e-5 * t for t in range(500)], "num_train_timesteps": 500},
]


def largest_difference(name: str, steps: int, config: dict[str, Any]) -> float:
    """Of coefficients, relative to the largest in their row; -1 where the reference has none."""
    theirs = expected(name, steps, config)
    if theirs is None:
        return -1.0
    ours = make(SAMPLERS[name], steps, config)
    if name.startswith("DPM2"):  # between two timesteps the reference rounds, down to nan
        assert ours.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist(), abs=2e-3)
    else:
        scheduler = build_scheduler(name, config)
        scheduler.set_timesteps(steps)
        assert ours.timesteps.tolist() == scheduler.timesteps.tolist()
    assert ours.draws == theirs.draws and ours.rows.shape == theirs.rows.shape
    difference = (ours.rows - theirs.rows).abs().amax(1) / theirs.rows.abs().amax(1)
    return float(difference.max())


def expected(name: str, steps: int, config: dict[str, Any]) -> Table | None:
    """The reference's table, unless it fails or is not a number.

    Much noise makes it round Karras's first timesteps to the same one, and it begins at the second.
    """
    try:
        theirs = trace(build_scheduler(name, config), steps, wide=True)
    except IndexError:
        return None
    return theirs if theirs.rows.isfinite().all() else None


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_coefficients_are_the_reference_s(name: str, steps: int) -> None:
    assert 0 <= largest_difference(name, steps, CONFIG) < PARITY["diffusers"]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_configs_mean_what_they_mean_to_the_reference(name: str, config: dict[str, Any]) -> None:
    for steps in (2, 9):
        difference = largest_difference(name, steps, config)
        assert difference < 3e-6
        assert difference >= 0 or "Karras" in name or config in BLIND


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tables_are_numbers(config: dict[str, Any]) -> None:
    """Also where the reference fails."""
    for name in SCHEDULERS:
        for steps in (1, 3, 20, 61, 100):
            ours = make(SAMPLERS[name], steps, config)
            assert ours.calls == unet_calls(name, steps) - (name == "PNDM" and steps == 1)
            assert ours.timesteps.min() >= 0
            assert ours.rows.isfinite().all() or (config in BLIND and name in ("DDIM", "DDPM"))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_alphas_are_the_reference_s(config: dict[str, Any]) -> None:
    """A product of a thousand rounded factors, whose roundings add up like those of a sum. At zero
    SNR a root is taken off all roots: they are as far apart then as they were.
    """
    ours, theirs = alphas(config), build_scheduler("DDIM", config).alphas_cumprod
    bound = summed(len(ours))
    if config.get("rescale_betas_zero_snr"):
        assert torch.allclose(ours.sqrt(), theirs.sqrt(), rtol=0, atol=bound)
    else:
        assert torch.allclose(ours, theirs, rtol=bound, atol=0)
    assert not torch.allclose(ours[1:], theirs[:-1], rtol=bound, atol=0)  # one step beside


@pytest.mark.parametrize(
    "config",
    [{"beta_schedule": "?"}, {"timestep_spacing": "?"}, {"prediction_type": "sample"}],
    ids=str,
)
def test_what_no_sampler_can_use_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointRefused, match="is not served"):
        make(SAMPLERS["Euler"], 20, config)


def test_more_steps_than_there_are_is_refused() -> None:
    with pytest.raises(CheckpointRefused, match="too few timesteps"):
        make(SAMPLERS["DDIM"], 20, {"num_train_timesteps": 10})


def _heun(**changed: Any) -> Sampler:
    heun = SAMPLERS["Heun"]
    return replace(heun, steps=replace(heun.steps, **changed))


@pytest.mark.parametrize(
    "mutant",
    [
        replace(SAMPLERS["Heun"], solve=solvers.euler),
        _heun(absent={}),
        _heun(ignores=()),
    ],
    ids=["solver", "absent", "ignores"],
)
def test_another_sampler_is_seen(mutant: Sampler) -> None:
    with red(SAMPLERS, "Heun", mutant):
        for config in ({}, ZERO_SNR):
            assert largest_difference("Heun", 9, config) < 3e-6


@pytest.mark.parametrize("steps", k_oracle.STEPS)
@pytest.mark.parametrize("name", IN_A1111)
def test_the_profile_a1111_is_k_diffusions(name: str, steps: int) -> None:
    """Tables of its own sampling functions, of the largest coefficient; timesteps of a thousand."""
    ours = table(name, steps, k_oracle.SDXL, "a1111")
    with np.load(k_oracle.GOLDEN) as kept:
        times, rows = kept[f"{name}/{steps}/times"], kept[f"{name}/{steps}/rows"]
    assert np.abs(ours.timesteps.numpy() - times).max() <= 1e-3
    columns = rows.shape[1]  # ours may draw a noise at the end, which it takes nothing of
    assert not ours.rows[:, columns:].any() and ours.rows.shape[1] - columns in (0, 1)
    difference = np.abs(ours.rows[:, :columns].numpy() - rows).max()
    assert difference <= PARITY["a1111"] * np.abs(rows).max()


def test_mutant_profiles_are_seen() -> None:
    """Other places to step are further from it than the tolerance by far."""
    with np.load(k_oracle.GOLDEN) as kept:
        for name in IN_A1111:
            rows = kept[f"{name}/25/rows"]
            other = table(name, 25, CONFIG).rows.numpy()[:, : rows.shape[1]]
            assert np.abs(other - rows).max() > 1e-3 * np.abs(rows).max()


def test_profiles_have_the_samplers_that_are_offered() -> None:
    assert tuple(PROFILES["diffusers"]) == SCHEDULERS
    assert tuple(PROFILES["a1111"]) == IN_A1111
    with pytest.raises(BadParameter, match='"diffusers" with the scheduler PNDM; "a1111" has DPM'):
        read_params({"prompt": "x", "scheduler": "PNDM", "scheduler_profile": "a1111"})
