"""Parked and resumed, a picture has the bytes of one that was never stopped.

Every sampler, steps, park points, LoRA-free and changing prompts; each parked picture goes on in
another engine, which knows nothing but the request and the state. The final latent is compared,
for decoding is done one by one.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load

from imaged.engine import intake, snapshot
from imaged.engine.decode import Picture
from imaged.engine.engine import Engine
from imaged.engine.run import Run
from imaged.engine.snapshot import RunPlan
from imaged.errors import SnapshotRefused
from imaged.params.image_params import ImageParams
from imaged.sampling.schedulers import SCHEDULERS
from tests.mutants import red

SMALL = ImageParams("a red house", seed=5, img_width=128, img_height=128, samples=2)
PROMPTS = ("a red house", "a [blue|red] boat, [dawn:noon:2]")


@pytest.fixture(autouse=True)
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def latent(_: Any, run: Run) -> Picture:
        return Picture(run.result.numpy().tobytes(), 0, 0, run.plan.seed)

    monkeypatch.setattr("imaged.engine.decode.finished", latent)


def job(scheduler: str, rng: random.Random) -> ImageParams:
    return replace(
        SMALL,
        prompt=rng.choice(PROMPTS),
        scheduler=scheduler,
        num_inference_steps=rng.randint(4, 5),
        guidance_scale=rng.choice((1.0, 7.0)),
        seed=rng.randrange(1000),
    )


def made(engine: Engine, params: ImageParams, resume_plan: RunPlan = snapshot.WHOLE) -> list[bytes]:
    engine.submit("x", params, 0, resume_plan)
    while not (outcomes := engine.tick()):
        pass
    assert outcomes[0].error is None
    return [p.rgb for p in outcomes[0].pictures]


def engine_of(nets: Any) -> Engine:
    return Engine(nets, previews=False)


def parked(engine: Engine, params: ImageParams, ticks: int) -> dict[int, bytes]:
    """The states of a job after so many calls of an engine, beside another job."""
    engine.submit("x", params)
    engine.submit("other", replace(SMALL, seed=99, num_inference_steps=6))
    for _ in range(ticks):
        engine.tick()
    states = engine.snapshots("x")
    engine.cancel("x")
    engine.cancel("other")
    return states


def differing(nets: Any, schedulers: Sequence[str]) -> int:
    """How many of the parked jobs came out otherwise than run through."""
    rng, different = random.Random(1), 0
    before, after, through = engine_of(nets), engine_of(nets), engine_of(nets)
    for scheduler in schedulers:
        params = job(scheduler, rng)
        states = parked(before, params, rng.randint(1, params.unet_calls + 3))
        resumed = made(after, params, RunPlan(snapshots=states))
        different += resumed != made(through, params)
    return different


AGAIN = ("Euler a", "DPM2 a Karras", "Heun", "PNDM", "LMS")


@pytest.mark.parametrize(
    "schedulers", [AGAIN, pytest.param((*SCHEDULERS, *AGAIN), marks=pytest.mark.slow)], ids=len
)
def test_resumed_is_as_if_never_stopped(nets: Any, schedulers: Sequence[str]) -> None:
    assert differing(nets, schedulers) == 0


@pytest.mark.slow
def test_in_bfloat16_too(nets: Any) -> None:
    parts = ("unet", "text_encoder", "text_encoder_2")
    halves = replace(nets, **{p: copy.deepcopy(getattr(nets, p)).bfloat16() for p in parts})
    assert differing(halves, ["Euler a", "DPM++ 2M Karras", "Heun", "PNDM"]) == 0


def off_by_one(run: Run, saved: Any) -> None:
    snapshot.resume(run, saved)
    run.call += run.call < run.calls_to_make - 1


def noise_forgotten(run: Run, saved: Any) -> None:
    snapshot.resume(run, saved)
    run.history.generator.manual_seed(run.plan.seed)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [off_by_one, noise_forgotten], ids=lambda m: m.__name__)
def test_mutants_are_seen(nets: Any, mutant: Callable[..., None]) -> None:
    with red(intake, "resume", mutant):
        assert differing(nets, ["Euler a", "DPM++ 2M Karras"] * 3) == 0


@pytest.mark.parametrize(
    "scheduler",
    [
        "Euler a",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("DPM++ 2M Karras", "Heun", "PNDM")),
    ],
)
def test_a_draft_goes_on_as_if_never_stopped(nets: Any, scheduler: str) -> None:
    params = replace(SMALL, scheduler=scheduler, num_inference_steps=8, samples=3)
    engine = engine_of(nets)
    engine.submit("draft", params, 0, RunPlan(draft=3))
    while not (outcomes := engine.tick()):
        pass
    [draft] = outcomes
    assert len(draft.snapshots) == len(draft.pictures) == 3
    assert draft.calls == 3 * engine_calls(scheduler, 3)
    chosen = RunPlan(samples=(0, 2), snapshots={0: draft.snapshots[0], 2: draft.snapshots[2]})
    whole = made(engine_of(nets), params)
    assert made(engine_of(nets), params, chosen) == [whole[0], whole[2]]
    assert [p.rgb for p in draft.pictures] != whole


def engine_calls(scheduler: str, steps: int) -> int:
    return {"Heun": 2 * steps, "PNDM": steps + 1}.get(scheduler, steps)


def test_what_differs_is_named(nets: Any) -> None:
    [content] = parked(engine_of(nets), replace(SMALL, samples=1), 3).values()

    def refusal(content: bytes, **other: Any) -> str:
        engine = engine_of(replace(nets, **other.pop("nets", {})))
        params = replace(SMALL, samples=1, **other)
        engine.submit("x", params, 0, RunPlan(snapshots={0: content}, varied=True))
        [outcome] = engine.tick()
        assert isinstance(outcome.error, SnapshotRefused)
        return outcome.error.detail

    for words, found in (
        ("other weights", refusal(content, nets={"sha256": "0" * 64})),
        ("another table", refusal(content, num_inference_steps=24)),
        ("another table", refusal(content, scheduler="Euler")),
        ("another seed", refusal(content, seed=6)),
        ("another size", refusal(content, img_width=192)),
        ("not whole", refusal(content[:-1])),
        ("not whole", refusal(b"\x80\x04K*.")),
        ("another version", refusal(content.replace(b'"engine":"0', b'"engine":"9'))),
        ("another format", refusal(content.replace(b'"format":"1"', b'"format":"2"'))),
    ):
        assert words in found, (words, found)


def test_a_state_that_is_refused_costs_time_only(nets: Any) -> None:
    params = replace(SMALL, num_inference_steps=5, samples=1)
    again = made(engine_of(nets), params, RunPlan(snapshots={0: b"broken"}))
    assert again == made(engine_of(nets), params)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (b'"device":"CPU', b'"device":"GPU', "another device"),
        (b'"dtype":"float32', b'"dtype":"float16', "another type"),
        (b'"determinism":"exact', b'"determinism":"inexa', "other determinism class"),
    ],
)
def test_elsewhere_only_another_request_goes_on(
    nets: Any, caplog: pytest.LogCaptureFixture, before: bytes, after: bytes, words: str
) -> None:
    """Whose bits nobody promised; any other picture begins anew."""
    [content] = parked(engine_of(nets), replace(SMALL, samples=1), 3).values()
    assert before in content
    resume_plan = RunPlan(snapshots={0: content.replace(before, after)})
    for varied in (False, True):
        engine = engine_of(nets)
        engine.submit("x", replace(SMALL, samples=1), 0, replace(resume_plan, varied=varied))
        engine.tick()
        [progress] = engine.progress().values()
        assert progress.calls == (1 if not varied else 1 + calls_of(content))
    assert words in caplog.text


def calls_of(content: bytes) -> int:
    return len(load(content)["outputs"])


def test_its_size(nets: Any) -> None:
    """Of SDXL's latents at 1024 px a call adds 256 KiB; nothing in it can be run."""
    [content] = parked(engine_of(nets), replace(SMALL, samples=1), 9).values()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    calls, *shape = header["outputs"]["shape"]
    assert header["outputs"]["dtype"] == "F32"
    assert len(content) - 8 - length == calls * torch.Size(shape).numel() * 4
    assert set(header) == {"__metadata__", "outputs"}
