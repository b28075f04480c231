"""The loop on the real checkpoint at 128 px: joining, leaving, sharing calls, failing alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from imaged.engine.decode import decode
from imaged.engine.engine import Engine, Outcome
from imaged.engine.prompt.encode import PromptEncoder
from imaged.errors import JobFailed
from imaged.params import ImageParams

SMALL = ImageParams("a house", num_inference_steps=20, seed=1, img_width=128, img_height=128)


class Counting:
    """The real UNet, with the number of rows of each call noted."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.rows = unet, []

    def __call__(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.rows.append(len(sample))
        return self.unet(sample, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)


@pytest.fixture
def counted(nets: Any) -> tuple[Engine, list[int]]:
    unet = Counting(nets.unet)
    return Engine(replace(nets, unet=unet)), unet.rows


def run(engine: Engine) -> list[Outcome]:
    outcomes = []
    while not engine.idle:
        outcomes += engine.tick()
    return outcomes


def test_jobs_join_between_calls_and_share_them(counted: tuple[Engine, list[int]]) -> None:
    engine, rows = counted
    engine.submit("first", SMALL)
    for _ in range(5):
        assert engine.tick() == []
    assert engine.progress() == {"first": (5, 20)}
    engine.submit("second", replace(SMALL, scheduler="Heun", seed=2))
    outcomes = run(engine)
    assert {o.job_id for o in outcomes} == {"first", "second"}
    assert rows == [2] * 5 + [4] * 15 + [2] * (39 - 15)


def test_guidance_one_has_no_unconditional_half(counted: tuple[Engine, list[int]]) -> None:
    engine, rows = counted
    engine.submit("plain", replace(SMALL, guidance_scale=1.0))
    engine.submit("guided", SMALL)
    run(engine)
    assert rows == [3] * 20


def test_samples_come_out_in_the_order_of_their_seeds(counted: tuple[Engine, list[int]]) -> None:
    engine, rows = counted
    engine.submit("x", replace(SMALL, samples=3))
    [outcome] = run(engine)
    assert [p.seed for p in outcome.pictures] == [1, 2, 3]
    assert rows == [6] * 20


def test_sizes_take_turns(counted: tuple[Engine, list[int]]) -> None:
    engine, _ = counted
    engine.submit("square", SMALL)
    engine.submit("wide", replace(SMALL, img_width=192))
    for _ in range(10):
        engine.tick()
    assert engine.progress() == {"square": (5, 20), "wide": (5, 20)}
    assert len(run(engine)) == 2


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
    assert rows == [4] * 3 + [2] * 17


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
    unet = Narrow(nets.unet)
    engine = Engine(replace(nets, unet=unet))
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


def test_a_failing_sample_fails_its_job_once(nets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from imaged.engine import engine as module

    def broken(vae: Any, latent: torch.Tensor, seed: int) -> Any:
        return decode(vae, latent * float("nan") if seed == 2 else latent, seed)

    monkeypatch.setattr(module, "decode", broken)
    engine = Engine(nets)
    engine.submit("x", replace(SMALL, samples=3))
    engine.submit("y", replace(SMALL, seed=50))
    outcomes = {o.job_id: o for o in run(engine)}
    assert outcomes["x"].error is not None and outcomes["x"].error.code == "nan_output"
    assert outcomes["x"].pictures == () and outcomes["y"].error is None


def test_broken_pictures_do_not_pass(nets: Any) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(JobFailed, match="not a number"):
            decode(nets.vae, torch.full((4, 16, 16), value), 1)
    flat = SimpleNamespace(
        config=SimpleNamespace(scaling_factor=1.0),
        dtype=torch.float32,
        decode=lambda z, return_dict: (torch.full((1, 3, 128, 128), -1.0),),
    )
    with pytest.raises(JobFailed, match="one flat colour"):
        decode(flat, torch.zeros(4, 16, 16), 1)


def test_latent_statistics_are_undone(nets: Any) -> None:
    """Checkpoints may carry per-channel mean and deviation of their latents."""
    seen: list[torch.Tensor] = []

    def keep(z: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        seen.append(z)
        return (torch.rand(1, 3, 8, 8),)

    config = SimpleNamespace(
        scaling_factor=0.5, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0] * 4
    )
    vae = SimpleNamespace(config=config, dtype=torch.float32, decode=keep)
    decode(vae, torch.ones(4, 1, 1), 1)
    assert seen[0].flatten().tolist() == [5.0, 6.0, 7.0, 8.0]


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
    torch.testing.assert_close(parts.context, single.context, rtol=1e-5, atol=1e-5)
    assert torch.allclose(parts.pooled, single.pooled, atol=1e-5)


def test_weights_change_the_context_and_one_does_not(nets: Any) -> None:
    encoder = PromptEncoder(nets)
    plain, one, more = (
        encoder.pair(text, None)[0].context for text in ("a cat", "a (cat:1.0)", "a (cat:1.5)")
    )
    assert torch.equal(plain, one)
    assert not torch.allclose(plain, more)
    assert torch.isfinite(more).all()
