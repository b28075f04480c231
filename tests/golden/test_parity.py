"""The engine against diffusers' own SDXL pipeline on the shipped checkpoint.

Reference: diffusers.StableDiffusionXLPipeline with its own nets, its own schedulers and one CPU
generator. Tolerance: what rounding makes of the reference itself, see tests/tolerance.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from imaged.catalogue.model import MICRO
from imaged.engine.decode import Picture
from imaged.engine.engine import Engine
from imaged.engine.plan import Plan
from imaged.engine.sampling import tables
from imaged.params.image_params import ImageParams
from imaged.sampling.schedulers import SCHEDULERS, step_of_call
from tests.oracle import build_scheduler
from tests.tolerance import difference, with_bound

SCHEDULER = json.loads((MICRO / "scheduler" / "scheduler_config.json").read_text())
PROMPT, NEGATIVE = "a red house by a lake, snowed mountains", "trees"


def our_latents(
    nets: Any, monkeypatch: pytest.MonkeyPatch, *jobs: ImageParams
) -> dict[int, torch.Tensor]:
    """Seed -> final latent (C, h, w) of jobs that run together."""
    latents: dict[int, torch.Tensor] = {}

    def keep(_: Any, latent: torch.Tensor, seed: int) -> Picture:
        latents[seed] = latent
        return Picture(b"", 0, 0, seed)

    monkeypatch.setattr("imaged.engine.decode.decode", keep)
    engine = Engine(nets)
    for n, params in enumerate(jobs):
        engine.submit(f"job {n}", params)
    while not engine.idle:
        for outcome in engine.tick():
            assert outcome.error is None
    return latents


def encoded(theirs: Any, text: str, negative: str | None) -> dict[str, torch.Tensor]:
    """What the pipeline's loop reads of a text, without and with it."""
    positive, other, pooled, pooled_other = theirs.encode_prompt(
        text, negative_prompt=negative, do_classifier_free_guidance=True
    )
    return {
        "prompt_embeds": torch.cat([other, positive]),
        "add_text_embeds": torch.cat([pooled_other, pooled]),
    }


def their_latents(theirs: Any, params: ImageParams, texts: list[str] | None = None) -> torch.Tensor:
    """`texts`: what the prompt says at each call of the UNet, if that changes."""
    said = [encoded(theirs, text, params.negative_prompt) for text in texts or ()]

    def change(pipeline: Any, call: int, __: Any, ___: Any) -> dict[str, torch.Tensor]:
        share = step_of_call(params.scheduler, call + 1) / params.num_inference_steps
        guided = params.guidance_start <= share < params.guidance_end
        pipeline._guidance_scale = params.guidance_scale if guided else 1 + 1e-9
        return said[min(call + 1, len(said) - 1)] if said else {}

    theirs.scheduler = build_scheduler(params.scheduler, SCHEDULER)
    latents: torch.Tensor = theirs(
        texts[0] if texts else params.prompt,
        negative_prompt=params.negative_prompt,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        width=params.img_width,
        height=params.img_height,
        guidance_rescale=params.guidance_rescale,
        clip_skip=params.clip_skip or None,
        original_size=params.original_size and params.original_size[::-1],
        crops_coords_top_left=(params.crop or (0, 0))[::-1],
        target_size=params.target_size and params.target_size[::-1],
        output_type="latent",
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=["latents"],
        generator=torch.Generator("cpu").manual_seed(params.seed),
    ).images[0]
    return latents


def bounded(theirs: Any, params: ImageParams, *texts: list[str]) -> tuple[torch.Tensor, float]:
    """Their latents, and how far from them ours may be."""
    return with_bound(theirs.unet, lambda: their_latents(theirs, params, *texts))


def small(scheduler: str, **given: Any) -> ImageParams:
    """128 px: below what the API offers, but the same arithmetic in a fraction of the time."""
    values = {"prompt": PROMPT, "seed": 11, "img_width": 128, "img_height": 128}
    return ImageParams(scheduler=scheduler, **{**values, "num_inference_steps": 8, **given})


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        *((name, 10) for name in SCHEDULERS if name != "DPM2 a Karras"),
        ("DPM2 a Karras", 12),
        pytest.param("DPM++ 2M Karras", 25, marks=pytest.mark.slow),
        pytest.param("Euler a", 30, marks=pytest.mark.slow),
    ],
)  # tables are compared at many more steps, see tests/engine/test_samplers.py
def test_final_latents(
    nets: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch, scheduler: str, steps: int
) -> None:
    # 256 px: at sizes never trained the net amplifies rounding
    params = small(scheduler, num_inference_steps=steps, img_width=256, img_height=256)
    ours = our_latents(nets, monkeypatch, params)[11]
    expected, bound = bounded(theirs, params)
    assert difference(ours, expected) <= bound


@pytest.mark.parametrize(
    "given",
    [
        {"negative_prompt": NEGATIVE},
        {"negative_prompt": ""},
        {"guidance_scale": 1.0},
        {"guidance_scale": 15.0},
        {"guidance_rescale": 0.7},
        {"guidance_end": 0.4},
        {"guidance_end": 0.5, "scheduler": "Heun"},
        {"clip_skip": 1},
        {"original_size": (512, 256), "crop": (64, 32), "target_size": (1024, 768)},
        {"img_width": 192, "img_height": 128},
        {"seed": 999_999_999_999_999},
        {"seed": 0},
        pytest.param(
            {"img_width": 512, "img_height": 512, "num_inference_steps": 8}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_every_knob(
    nets: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    params = small(**{"scheduler": "DPM++ 2M Karras", **given})
    ours = our_latents(nets, monkeypatch, params)[params.seed]
    expected, bound = bounded(theirs, params)
    assert difference(ours, expected) <= bound


@pytest.mark.parametrize(
    "scheduler",
    ["DPM++ 2M Karras", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Heun", "PNDM"))],
)
def test_a_prompt_that_changes(
    nets: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    """One call a step, two, and one more in the first."""
    params = small(scheduler, prompt="[a red house:[a blue boat|a man]:5]", num_inference_steps=13)
    several: dict[str, Callable[[int], int]]
    several = {"Heun": lambda n: n // 2, "PNDM": lambda n: max(n - 1, 0)}
    of_call: Callable[[int], int] = several.get(scheduler, lambda n: n)
    steps = ["a red house"] * 5 + ["a man", "a blue boat"] * 4
    texts = [steps[of_call(n)] for n in range(params.unet_calls)]
    ours = our_latents(nets, monkeypatch, params)[params.seed]
    expected, bound = bounded(theirs, params, texts)
    assert difference(ours, expected) <= bound
    texts.insert(5, texts[4])  # a mutant: one call late
    assert difference(ours, their_latents(theirs, params, texts)) > 10 * bound


def test_a_mixed_crowd_equals_each_alone(
    nets: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All samplers, different steps, guidance and prompts in shared UNet calls."""
    stack_texts = [
        small(
            name,
            seed=100 + n,
            num_inference_steps=4 + n % 6,
            guidance_scale=1.0 + n / 2,
            prompt=PROMPT + " and a tree" * (n % 3),
        )
        for n, name in enumerate(SCHEDULERS)
    ]
    together = our_latents(nets, monkeypatch, *stack_texts)
    for params in stack_texts:
        alone, bound = bounded(theirs, params)
        assert difference(together[params.seed], alone) <= bound, params.scheduler


def test_sample_k_is_the_single_job_with_seed_plus_k(
    nets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = our_latents(nets, monkeypatch, small("Euler a", samples=4))
    assert sorted(many) == [11, 12, 13, 14]
    for seed in many:
        one = our_latents(nets, monkeypatch, small("Euler a", seed=seed))[seed]
        assert torch.equal(many[seed], one)


def test_mutants_are_seen(nets: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong sampler, a wrong seed, guidance off by a thousandth, no size conditioning."""
    params = small("Euler a")
    expected, bound = bounded(theirs, params)

    def found(wrong: ImageParams) -> float:
        [ours] = our_latents(nets, monkeypatch, wrong).values()
        return difference(ours, expected)

    for wrong in (small("Euler"), small("Euler a", seed=12)):
        assert found(wrong) > 100 * bound
    assert found(small("Euler a", guidance_scale=params.guidance_scale * 1.001)) > bound
    monkeypatch.setattr(Plan, "time_ids", (1024, 1024, 0, 0, 1024, 1024))
    assert found(params) > bound


@pytest.mark.parametrize("scheduler", ["Euler a", "DPM++ 2M Karras", "LMS", "UniPC"])
def test_a_wrong_row_of_a_table_is_seen(
    nets: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    """In its middle, by a hundredth."""
    params = small(scheduler)
    expected, bound = bounded(theirs, params)
    made = tables.make

    def wrong(*given: Any) -> tables.Table:
        table = made(*given)
        rows = table.rows.clone()
        rows[table.calls // 2] *= 1.01
        return replace(table, rows=rows)

    monkeypatch.setattr(tables, "make", wrong)
    tables._cached.cache_clear()
    [ours] = our_latents(nets, monkeypatch, params).values()
    tables._cached.cache_clear()
    assert difference(ours, expected) > bound
