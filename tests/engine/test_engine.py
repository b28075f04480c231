"""The loop on the real checkpoint at 128 px: joining, leaving, sharing calls, failing alone."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import numpy as np
import pytest
import torch
from PIL import Image

from imaged.catalogue.model import MICRO
from imaged.engine.decode import StepExecutor, decode
from imaged.engine.engine import Engine
from imaged.engine.nets.cached_unet import Unet
from imaged.engine.outcome import Outcome, as_failure
from imaged.engine.plan import plan_images
from imaged.engine.prompt.encode import PromptEncoder
from imaged.engine.run import History, Run
from imaged.engine.scheduling.batching import Cost
from imaged.engine.scheduling.call_budget import PIXELS_A_CALL, CallBudget
from imaged.engine.scheduling.row_buckets import VerifiedBatchSizes
from imaged.engine.snapshot import RunPlan
from imaged.errors import JobFailed
from imaged.params.image_params import ImageParams
from imaged.prompt import Prompt, Reading
from imaged.sampling.schedulers import SCHEDULERS
from tests.tolerance import difference, in_float64, rounding, summed

SMALL = ImageParams("a house", num_inference_steps=8, seed=1, img_width=128, img_height=128)


class Counting:
    """The real UNet, with the number of rows of each call noted."""

    def __init__(self, unet: Unet) -> None:
        self.unet, self.rows = unet, list[int]()

    def __call__(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.rows.append(len(sample))
        return self.unet(sample, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)


def engine_of(nets: Any, **given: Any) -> Engine:
    """An engine for which calls cost the same whatever they hold, so that all share them."""
    engine: Any = Engine(nets, **given)
    engine.device_time.cost_model = SimpleNamespace(
        cost=Cost(1.0, 0.0), add=lambda work, seconds: None
    )
    return cast(Engine, engine)


Double = TypeVar("Double", bound=Counting)


def put_in(engine: Any, kind: type[Double]) -> Double:
    """The engine's UNet from now on: one of this kind around what it was."""
    engine.variants.unet = unet = kind(engine.variants.unet)
    return unet


@pytest.fixture
def counted(nets: Any) -> Iterator[tuple[Engine, list[int]]]:
    """Free batch sizes, so that the rows that a call holds are those of its pictures."""
    engine = engine_of(nets, exact=False)
    unet = put_in(engine, Counting)
    yield engine, unet.rows
    engine.close()


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are decoded in a thread, as on a GPU."""
    monkeypatch.setattr("imaged.engine.engine.decoder", lambda _: ThreadPoolExecutor(1))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Seed 1 is not decoded before this is set."""
    opened = threading.Event()

    def slow(vae: Any, latent: torch.Tensor, seed: int) -> Any:
        assert seed != 1 or opened.wait(60)
        return decode(vae, latent, seed)

    monkeypatch.setattr("imaged.engine.decode.decode", slow)
    return opened


def run(engine: Engine) -> list[Outcome]:
    outcomes = []
    while not engine.idle:
        outcomes += engine.tick()
    return outcomes


def calls(engine: Engine) -> dict[str, tuple[int, int]]:
    return {job_id: (p.calls, p.total) for job_id, p in engine.progress().items()}


def test_jobs_join_between_calls_and_share_them(counted: tuple[Engine, list[int]]) -> None:
    engine, rows = counted
    engine.submit("first", SMALL)
    for _ in range(5):
        assert engine.tick() == []
    assert calls(engine) == {"first": (5, 8)}
    engine.submit("second", replace(SMALL, scheduler="Heun", seed=2))
    outcomes = run(engine)
    assert {o.job_id for o in outcomes} == {"first", "second"}
    assert rows == [2] * 5 + [4] * 3 + [2] * (15 - 3)


def test_no_more_than_one_call_is_ahead_of_a_device_that_lags(nets: Any, beside: None) -> None:
    """Calls on a GPU are launched, not made: the engine waits for the last but one."""
    waited: list[tuple[int, int]] = []
    marks = count()

    def seconds(began: int, ended: int) -> float:
        waited.append((began, ended))
        return 0.5

    engine: Any = Engine(nets)
    engine.device_time.clock = SimpleNamespace(ahead=1, mark=lambda: next(marks), seconds=seconds)
    engine.submit("x", replace(SMALL, num_inference_steps=3), key_id=7)
    for made in range(3):
        engine.tick()
        assert waited == [(2 * n, 2 * n + 1) for n in range(made)]
    run(engine)
    assert waited == [(0, 1), (2, 3), (4, 5)]
    assert engine.device_time.used_s == {7: 1.5}


def test_guidance_one_has_no_unconditional_half(counted: tuple[Engine, list[int]]) -> None:
    engine, rows = counted
    engine.submit("plain", replace(SMALL, guidance_scale=1.0))
    engine.submit("guided", SMALL)
    run(engine)
    assert rows == [3] * 8


def test_samples_come_out_in_the_order_of_their_seeds(counted: tuple[Engine, list[int]]) -> None:
    engine, rows = counted
    engine.submit("x", replace(SMALL, samples=3))
    [outcome] = run(engine)
    assert [p.seed for p in outcome.pictures] == [1, 2, 3]
    assert rows == [6] * 8


def test_sizes_do_not_share_and_both_come_out(counted: tuple[Engine, list[int]]) -> None:
    engine, rows = counted
    engine.submit("square", SMALL)
    engine.submit("wide", replace(SMALL, img_width=192))
    assert len(run(engine)) == 2
    assert rows == [2] * 16


def test_cancelled_job_leaves_without_an_outcome(counted: tuple[Engine, list[int]]) -> None:
    engine, rows = counted
    engine.submit("stays", SMALL)
    engine.submit("leaves", SMALL)
    engine.submit("never starts", SMALL)
    engine.cancel("never starts")
    for _ in range(3):
        engine.tick()
    engine.cancel("leaves")
    assert [o.job_id for o in run(engine)] == ["stays"]
    assert rows == [4] * 3 + [2] * 5


def test_one_job_fails_alone(nets: Any) -> None:
    engine = Engine(nets)
    engine.submit("bad", replace(SMALL, scheduler="no such sampler"))
    engine.submit("good", SMALL)
    outcomes = {o.job_id: o for o in run(engine)}
    assert outcomes["good"].error is None and len(outcomes["good"].pictures) == 1
    assert outcomes["bad"].error is not None and outcomes["bad"].error.code == "engine_error"


class Narrow(Counting):
    """A device that holds so many rows and no more."""

    most = 4

    def __call__(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(sample) > self.most:
            raise torch.OutOfMemoryError("the device is full")
        return super().__call__(sample, *args, **kwargs)


def test_a_crowd_that_does_not_fit_goes_on_in_smaller_calls(nets: Any) -> None:
    engine = engine_of(nets, exact=False)
    unet = put_in(engine, Narrow)
    for seed in range(4):
        engine.submit(str(seed), replace(SMALL, seed=seed))
    outcomes = run(engine)
    assert len(outcomes) == 4 and all(o.error is None for o in outcomes)
    assert max(unet.rows) == 4
    unet.most = 1
    engine.submit("large", SMALL)
    engine.submit("plain", replace(SMALL, guidance_scale=1.0))
    ends = {o.job_id: o.error and o.error.code for o in run(engine)}
    assert ends == {"large": "out_of_memory", "plain": None}


def test_larger_calls_are_tried_again_later(nets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(nets, exact=False)
    unet = put_in(engine, Narrow)
    for seed in range(4):
        engine.submit(str(seed), replace(SMALL, seed=seed, num_inference_steps=6))
    for _ in range(3):
        engine.tick()
    assert unet.rows == [4, 4]  # the first did not fit
    unet.most = 8  # somebody else has given memory back
    monkeypatch.setattr(engine.budget, "grow_at", 0.0)
    outcomes = run(engine)
    assert len(outcomes) == 4 and all(o.error is None for o in outcomes)
    budget = engine.budget
    assert 8 in unet.rows and math.isfinite(budget.grow_at)  # and larger ones later
    budget.pixels_a_call, budget.grow_at = budget.most_pixels // 2, 0.0
    budget.renew(1.0)
    assert (budget.pixels_a_call, budget.grow_at) == (budget.most_pixels, math.inf)


@pytest.mark.parametrize("where", [StepExecutor, partial(ThreadPoolExecutor, 1)])
@pytest.mark.parametrize("tries", [1, 9])
def test_a_decoding_that_does_not_fit_has_the_device_for_itself(
    nets: Any, monkeypatch: pytest.MonkeyPatch, tries: int, where: Any
) -> None:
    """After `tries` failures it would fit; the first is beside other pictures, the second not."""
    monkeypatch.setattr("imaged.engine.engine.decoder", lambda _: where())
    engine = engine_of(nets, exact=False)
    rows = put_in(engine, Counting).rows
    made: list[int] = []  # UNet calls before each try

    def full(vae: Any, latent: torch.Tensor, seed: int) -> Any:
        if seed == 1:
            made.append(len(rows))
            if len(made) <= tries:
                raise torch.OutOfMemoryError("the device is full")
        return decode(vae, latent, seed)

    monkeypatch.setattr("imaged.engine.decode.decode", full)
    engine.submit("large", replace(SMALL, num_inference_steps=2))
    engine.submit("other", replace(SMALL, seed=9))
    ends = {o.job_id: o.error and o.error.code for o in run(engine)}
    assert ends == {"large": None if tries == 1 else "out_of_memory", "other": None}
    assert len(made) == 2 and made[0] <= made[1] <= made[0] + 2  # what was under way ended


def test_a_failing_sample_fails_its_job_once(nets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(vae: Any, latent: torch.Tensor, seed: int) -> Any:
        return decode(vae, latent * float("nan") if seed == 2 else latent, seed)

    monkeypatch.setattr("imaged.engine.decode.decode", broken)
    engine = Engine(nets)
    engine.submit("x", replace(SMALL, samples=3))
    engine.submit("y", replace(SMALL, seed=50))
    outcomes = {o.job_id: o for o in run(engine)}
    assert outcomes["x"].error is not None and outcomes["x"].error.code == "nan_output"
    assert outcomes["x"].pictures == () and outcomes["y"].error is None


class Painting:
    """Stands in for a VAE that paints what it is told to."""

    dtype = torch.float32

    def __init__(self, paint: Callable[[torch.Tensor], torch.Tensor], **config: Any) -> None:
        self.paint = paint
        self.config = SimpleNamespace(**{"latents_mean": None, "latents_std": None, **config})

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        return self.paint(z)


def flatly(shade: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return shade.expand(1, 3, 128, 128)


def test_broken_pictures_do_not_pass(nets: Any) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(JobFailed, match="not a number"):
            decode(nets.vae, torch.full((4, 16, 16), value), 1)
    colour = torch.tensor([200.0, 40.0, 40.0]).view(1, 3, 1, 1) / 127.5 - 1
    for shade in (torch.full((1, 3, 1, 1), -1.0), colour):
        flat: Any = Painting(partial(flatly, shade), scaling_factor=1.0)
        with pytest.raises(JobFailed, match="one flat colour"):
            decode(flat, torch.rand(4, 16, 16), 1)
    for latent in (torch.zeros(4, 16, 16), torch.rand(4, 1, 1).expand(4, 16, 16)):
        with pytest.raises(JobFailed, match="flat latents"):
            decode(nets.vae, latent, 1)


class Overflowing(torch.nn.Module):
    """No numbers but in float32, as with checkpoints that overflow in halves."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x) * (1.0 if x.dtype == torch.float32 else float("nan"))


def overflowing(nets: Any) -> Any:
    unet = copy.deepcopy(nets.unet).bfloat16()
    unet.conv_out = Overflowing(unet.conv_out)
    return replace(nets, unet=unet)


def test_what_overflows_is_made_again_in_float32(nets: Any) -> None:
    pictures = []
    for like in (
        overflowing(nets),
        replace(nets, unet=copy.deepcopy(nets.unet).bfloat16().float()),
    ):
        engine = Engine(like)
        engine.submit("x", replace(SMALL, samples=2, num_inference_steps=4))
        [outcome] = run(engine)
        assert outcome.error is None
        assert engine.variants.copies is None  # not kept: it is as large as the checkpoint
        pictures.append([p.rgb for p in outcome.pictures])
    assert pictures[0] == pictures[1]


def second_try(nets: Any) -> tuple[Engine, dict[int, bytes]]:
    """An engine amid the second try of a job, and the job's states there."""
    engine = engine_of(nets, previews=False)
    engine.submit("x", replace(SMALL, samples=2, num_inference_steps=4))
    engine.tick()
    [job] = engine.jobs.values()
    while not all(r.float32_retry and r.call >= 2 for r in job.runs):
        assert engine.tick() == []
    assert not any(r.done for r in job.runs)
    return engine, engine.snapshots("x")


def test_the_copies_in_float32_leave_with_a_cancelled_job(nets: Any) -> None:
    engine, _ = second_try(overflowing(nets))
    assert engine.variants.copies is not None
    engine.cancel("x")
    assert engine.idle and engine.variants.copies is None


def test_a_second_try_goes_on_in_float32(nets: Any) -> None:
    halves = overflowing(nets)
    before, states = second_try(halves)
    [through] = run(before)
    after = Engine(halves, previews=False)
    after.submit(
        "x", replace(SMALL, samples=2, num_inference_steps=4), 0, RunPlan(snapshots=states)
    )
    assert after.tick() == [] and calls(after)["x"] > (4, 8)
    [resumed] = run(after)
    assert resumed.error is None and through.error is None
    assert [p.rgb for p in resumed.pictures] == [p.rgb for p in through.pictures]


@pytest.mark.parametrize("when", ["it is resumed", "its company is chosen"])
def test_a_second_try_without_memory_fails_alone(
    nets: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("the device is full")

    halves = overflowing(nets)
    engine, states = second_try(halves)
    monkeypatch.setattr("imaged.engine.net_variants.float32_copies", full)
    if when == "it is resumed":
        engine = engine_of(halves, previews=False)
        resume_plan = RunPlan(snapshots=states)
        engine.submit("x", replace(SMALL, samples=2, num_inference_steps=4), 0, resume_plan)
    engine.variants.copies = None
    halves.unet.conv_out = halves.unet.conv_out.net  # the other one's
    engine.submit("y", replace(SMALL, num_inference_steps=4))
    ends = {o.job_id: o.error and o.error.code for o in run(engine)}
    assert ends == {"x": "out_of_memory", "y": None}


def test_without_memory_for_a_second_try_or_a_look_only_that_is_lost(
    nets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("the device is full")

    engine = Engine(overflowing(nets))
    monkeypatch.setattr("imaged.engine.net_variants.float32_copies", full)
    engine.previews.rgb = Future()
    engine.previews.rgb.set_exception(torch.OutOfMemoryError("the device is full"))
    engine.submit("x", replace(SMALL, num_inference_steps=6))
    [outcome] = run(engine)
    assert outcome.error is not None and outcome.error.code == "out_of_memory"
    plain = Engine(nets)
    plain.previews.rgb = engine.previews.rgb
    plain.submit("y", replace(SMALL, num_inference_steps=6))
    [outcome] = run(plain)
    assert outcome.error is None and not plain.previews.on


def test_what_is_broken_in_float32_too_fails_after_one_more_try(
    nets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(overflowing(nets))
    tries: list[bool] = []

    def broken(vae: Any, latent: torch.Tensor, seed: int) -> Any:
        tries.append(bool(torch.isfinite(latent).all()))
        return decode(vae, latent * float("nan"), seed)

    monkeypatch.setattr("imaged.engine.decode.decode", broken)
    engine.submit("x", replace(SMALL, num_inference_steps=4))
    [outcome] = run(engine)
    assert outcome.error is not None and outcome.error.code == "nan_output"
    assert tries == [False, True]


def test_other_device_errors_end_the_process(nets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that such a device computes can be trusted; the supervisor starts a new worker."""

    def fault(*_: Any) -> Any:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    for name in ("engine.denoise", "decode.decode"):
        with monkeypatch.context() as patch:
            patch.setattr(f"imaged.engine.{name}", fault)
            engine = Engine(nets)
            engine.submit("x", replace(SMALL, num_inference_steps=2))
            with pytest.raises(torch.AcceleratorError):
                run(engine)


def test_a_gpu_library_reports_device_errors_as_plain_ones() -> None:
    error = RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")
    with pytest.raises(RuntimeError, match="cuDNN"):
        as_failure(error, "cuda")
    for said, device, code in (
        (error, "cpu", "engine_error"),
        (torch.OutOfMemoryError("full"), "cuda", "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "cpu", "out_of_memory"),
    ):
        failure = as_failure(said, device)
        assert failure is not None and failure.code == code


def test_a_decoding_does_not_keep_others_waiting(
    nets: Any, beside: None, gate: threading.Event
) -> None:
    engine = Engine(nets)
    engine.submit("first", replace(SMALL, num_inference_steps=2))
    for _ in range(2):
        assert engine.tick() == []
    engine.submit("second", replace(SMALL, seed=2))
    for _ in range(8):
        assert engine.tick() == []
    assert calls(engine) == {"first": (2, 2), "second": (8, 8)}
    gate.set()
    assert [o.job_id for o in run(engine)] == ["first", "second"]


def test_on_the_cpu_one_picture_is_decoded_a_tick_in_the_loop(
    nets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch in a second thread would have more threads compute than there are cores."""
    decoded: list[tuple[int, int]] = []

    def noted(vae: Any, latent: torch.Tensor, seed: int) -> Any:
        decoded.append((seed, threading.get_ident()))
        return decode(vae, latent, seed)

    monkeypatch.setattr("imaged.engine.decode.decode", noted)
    engine = engine_of(nets, exact=False)
    engine.submit("pair", replace(SMALL, num_inference_steps=2, samples=2))
    engine.submit("longer", replace(SMALL, seed=9, num_inference_steps=5))
    here = threading.get_ident()
    for ticks, seeds in enumerate([[], [1], [1, 2], [1, 2], [1, 2, 9]], 1):
        engine.tick()
        assert decoded == [(seed, here) for seed in seeds]
        assert engine.idle or calls(engine)["longer"] == (ticks, 5)
    assert engine.idle


@pytest.mark.parametrize("beside", [False, True], ids=["in turn", "beside the loop, as on a GPU"])
def test_previews_look_like_the_picture(
    nets: Any, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    if beside:
        monkeypatch.setattr("imaged.engine.engine.decoder", lambda _: ThreadPoolExecutor(1))
    engine = Engine(nets)
    assert engine.previews.rgb is not None and engine.previews.rgb.result(60)
    wide: dict[str, Any] = {"img_width": 256, "img_height": 256, "num_inference_steps": 20}
    engine.submit("x", replace(SMALL, prompt="a red house, noon", **wide))
    looks: dict[int, Any] = {}
    outcomes: list[Outcome] = []
    while not outcomes:
        outcomes = engine.tick()
        if "x" in engine.progress() and (look := engine.progress()["x"].preview):
            looks[look.call] = look
    assert sorted(looks) == [5, 10, 15]
    picture = outcomes[0].pictures[0]
    shown = Image.frombytes("RGB", (256, 256), picture.rgb).resize((32, 32), Image.Resampling.BOX)
    likeness = [
        np.corrcoef(np.asarray(shown).ravel(), np.frombuffer(look.rgb, np.uint8))[0, 1]
        for _, look in sorted(looks.items())
    ]
    assert likeness[-1] > 0.8 and likeness[-1] > likeness[0]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_estimate_is_the_clean_latent(scheduler: str, prediction: str) -> None:
    """A model that knows the clean latent is asked with each sampler's own inputs."""
    config = json.loads((MICRO / "scheduler" / "scheduler_config.json").read_text())
    config["prediction_type"] = prediction
    twenty = replace(SMALL, scheduler=scheduler, num_inference_steps=20)
    [plan] = plan_images(twenty, config, 4, 8)
    run = Run("x", plan, (), key_id=0)
    run.history = History(plan, torch.device("cpu"))
    clean = torch.rand(plan.latent_shape, generator=torch.Generator().manual_seed(1))
    for call in range(10):
        x, (signal, noise) = run.combine(), plan.levels(call)
        roundings = 16 * 2.0**-24 * float(x.abs().max()) / signal  # which it is divided by
        eps = (x - signal * clean) / noise
        run.advance(eps if prediction == "epsilon" else signal * eps - noise * clean)
        torch.testing.assert_close(run.result, clean, atol=roundings, rtol=0)


def test_a_key_that_floods_does_not_keep_others_waiting(nets: Any) -> None:
    """Eight jobs of one key, then one of another: it does not come out last."""
    engine = Engine(nets, pixels_a_call=2 * 128 * 128)
    for n in range(8):
        engine.submit(f"flood {n}", replace(SMALL, num_inference_steps=4), key_id=1)
    for _ in range(6):
        engine.tick()
    engine.submit("other", replace(SMALL, num_inference_steps=5), key_id=2)
    names = [o.job_id for o in run(engine)]
    assert names.index("other") <= 2


def test_a_key_that_comes_back_between_its_jobs_owes_what_it_used(nets: Any) -> None:
    """Short jobs of one key, one after the other, do not keep another's long one waiting."""
    engine = Engine(nets, pixels_a_call=2 * 128 * 128)
    engine.submit("long", replace(SMALL, num_inference_steps=12), key_id=2)
    outcomes: list[Outcome] = []
    sent = 0
    while not any(o.job_id == "long" for o in outcomes):
        if not any(job.startswith("short") for job in engine.jobs):
            engine.submit(f"short {sent}", replace(SMALL, num_inference_steps=3), key_id=1)
            sent += 1
        outcomes += engine.tick()
    assert sent <= 6  # turn by turn: four are as much work; without the debt there is no end


def allows(budget: CallBudget, pixels: int, rows: int) -> bool:
    picture: Any = SimpleNamespace(pixels=pixels, rows=2, kind="x", example=())
    return budget.allows(lambda _: cast(Unet, None), picture, rows)


def test_the_cap_on_a_call_is_one_of_pixels() -> None:
    budget = CallBudget(PIXELS_A_CALL, exact=False)
    for side, most in ((512, 16), (1024, 8), (1536, 3), (2048, 2)):
        assert [rows for rows in range(1, 30) if allows(budget, side * side, rows)][-1] == most


def test_padding_counts_where_the_device_was_full(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = CallBudget(7 * 128 * 128, exact=True)
    monkeypatch.setattr(budget.batch_sizes, "allow", lambda *_: True)
    assert allows(budget, 128 * 128, 4)
    assert not allows(budget, 128 * 128, 6)  # six are padded to eight


def test_a_call_of_one_picture_is_tried_again_without_a_decoding_beside_it(
    nets: Any, beside: None, gate: threading.Event
) -> None:
    engine = engine_of(nets, exact=False)
    unet = put_in(engine, Narrow)
    engine.submit("first", replace(SMALL, num_inference_steps=2))
    for _ in range(2):
        engine.tick()
    unet.most = 1  # while the first is decoded there is no room for two rows
    engine.submit("second", replace(SMALL, seed=2, num_inference_steps=2))
    for _ in range(3):
        assert engine.tick() == [] and len(unet.rows) == 2
    unet.most = 2
    gate.set()
    assert [(o.job_id, o.error) for o in run(engine)] == [("first", None), ("second", None)]


def test_row_counts_are_tried_one_a_tick_and_again_when_there_was_no_memory(
    nets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def agrees(unet: Any, rows: int, example: Any) -> bool:
        tried.append(rows)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("the device is full")
        return True

    monkeypatch.setattr("imaged.engine.scheduling.row_buckets.agrees", agrees)
    now = 1000.0
    monkeypatch.setattr(
        "imaged.engine.scheduling.row_buckets.time", SimpleNamespace(monotonic=lambda: now)
    )
    buckets, unet = VerifiedBatchSizes(), Unet(nets.unet)

    def allow(rows: int) -> bool:
        return buckets.allow(unet, "shape", rows, ())

    assert not allow(4) and not allow(8)  # one trial, for which there was no memory
    buckets.tried = False
    assert not allow(4) and allow(8) and tried == [4, 8]  # not so soon
    buckets.tried, now = False, 1061.0
    assert allow(4) and allow(2) and tried == [4, 8, 4]


def test_a_cancelled_job_that_comes_back_is_made_anew(nets: Any, beside: None) -> None:
    engine = Engine(nets)
    quick = replace(SMALL, num_inference_steps=2)
    engine.submit("x", quick)
    for _ in range(2):
        engine.tick()
    engine.cancel("x")
    engine.submit("x", replace(quick, seed=9))
    [outcome] = run(engine)
    assert [p.seed for p in outcome.pictures] == [9]


def test_what_is_cancelled_is_not_decoded(nets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def noted(vae: Any, latent: torch.Tensor, seed: int) -> Any:
        decoded.append(seed)
        return decode(vae, latent, seed)

    monkeypatch.setattr("imaged.engine.decode.decode", noted)
    engine = engine_of(nets, exact=False)
    engine.submit("pair", replace(SMALL, num_inference_steps=2, samples=2))
    for _ in range(2):
        engine.tick()
    engine.cancel("pair")
    engine.submit("next", replace(SMALL, seed=9, num_inference_steps=2))
    assert [o.job_id for o in run(engine)] == ["next"] and decoded == [1, 9]


def test_latent_statistics_are_undone(nets: Any) -> None:
    """Checkpoints may carry per-channel mean and deviation of their latents."""
    seen: list[torch.Tensor] = []

    def keep(z: torch.Tensor) -> torch.Tensor:
        seen.append(z)
        return torch.rand(1, 3, 8, 8)

    means, deviations = (1.0, 2.0, 3.0, 4.0), (2.0,) * 4
    vae: Any = Painting(keep, scaling_factor=0.5, latents_mean=means, latents_std=deviations)
    decode(vae, torch.arange(8.0).view(4, 1, 2), 1)
    assert seen[0].flatten().tolist() == [1.0, 5.0, 10.0, 14.0, 19.0, 23.0, 28.0, 32.0]


def test_context_lengths_agree_within_a_picture(nets: Any) -> None:
    encoder = PromptEncoder(nets)
    long, short = "cat " * 100, "dog"
    for prompt, negative, windows in (
        (short, None, 1),
        (long, None, 2),
        (short, long, 2),
        (long, short, 2),
        (short, "", 1),
        ("x " * 73 + "wow!!!", None, 2),  # one token more for the second tokenizer
    ):
        positive, other = encoder.pair(prompt, negative)
        assert positive.context.shape == other.context.shape
        assert positive.context.shape[0] == 77 * windows
    assert not encoder.pair(short, None)[1].context.any()
    assert encoder.pair(short, "")[1].context.any()


def test_a_text_of_too_many_tokens_fails_with_the_bound(nets: Any) -> None:
    with pytest.raises(JobFailed, match="at most 4800 tokens") as caught:
        PromptEncoder(nets).pair("a house", "\u9f98" * 20_000)
    assert caught.value.code == "prompt_too_long"


def test_windows_in_parts_are_the_windows_at_once(
    nets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a house and a tree " * 60
    parts = PromptEncoder(nets).pair(text, None)[0]
    monkeypatch.setattr("imaged.engine.prompt.encode.AT_A_TIME", 1)
    single = PromptEncoder(nets).pair(text, None)[0]
    with in_float64(nets.text_encoder, nets.text_encoder_2):
        exact = PromptEncoder(nets).pair(text, None)[0]
    for name in ("context", "pooled"):
        one, wide = getattr(single, name), getattr(exact, name)
        assert difference(getattr(parts, name), one) <= rounding(one, wide)


def test_emphasis_of_three_kinds(nets: Any) -> None:
    """Multiplied; multiplied, and the mean of each window as before; and not at all."""
    encoder, text = PromptEncoder(nets), "a (cat:1.5) " + "dog, " * 40
    plain, more, restored, none = (
        encoder.pair(text, None, Reading(*how))[0].context
        for how in (("plain",), (), ("a1111", "original"), ("a1111", "none"))
    )
    unweighted = encoder.pair(text.replace("(cat:1.5)", "cat"), None)[0].context
    assert torch.equal(none, unweighted) and not torch.equal(plain, unweighted)
    width = nets.text_encoder.config.hidden_size
    for side in (slice(None, width), slice(width, None)):  # each encoder by itself
        before, multiplied, after = (
            torch.unflatten(context[:, side], 0, (-1, 77))
            for context in (unweighted, more, restored)
        )
        ratio = before.mean((1, 2)) / multiplied.mean((1, 2))
        values = before[0].numel()  # of which a mean is a sum, small beside them
        spread = float(before.std() / before.mean().abs())
        near: dict[str, Any] = {"rtol": summed(values) * spread, "atol": 0.0}
        torch.testing.assert_close(after, multiplied * ratio[:, None, None], **near)
        torch.testing.assert_close(after.mean((1, 2)), before.mean((1, 2)), **near)


def test_texts_of_a_prompt_that_changes(nets: Any) -> None:
    """Each step has its own, in one context length for all; the same text is encoded once."""
    encoder = PromptEncoder(nets)
    prompt = Prompt("[a cat:" + "dog " * 80 + ":2]", steps=4)
    positive, other = encoder.by_step(prompt, Prompt("[x|y]", steps=4))
    assert [id(text) for text in positive] == [id(positive[n]) for n in (0, 0, 2, 2)]
    assert [id(text) for text in other] == [id(other[n]) for n in (0, 1, 0, 1)]
    assert {text.context.shape[0] for text in (*positive, *other)} == {2 * 77}
    alone = encoder.pair("dog " * 80, "x")
    assert torch.equal(positive[3].context, alone[0].context)
    assert torch.equal(other[0].context, alone[1].context)
    with pytest.raises(JobFailed, match="over the steps should be at most 4800 tokens"):
        encoder.by_step(Prompt("[a|b|c|d|e|f|g|h]" + "cat " * 4000, steps=20), None)


def test_weights_change_the_context_and_one_does_not(nets: Any) -> None:
    encoder = PromptEncoder(nets)
    plain, one, more = (
        encoder.pair(text, None)[0].context for text in ("a cat", "a (cat:1.0)", "a (cat:1.5)")
    )
    assert torch.equal(plain, one)
    assert not torch.allclose(plain, more)
    assert torch.isfinite(more).all()
