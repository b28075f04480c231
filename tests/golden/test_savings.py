"""What the engine computes once instead of in every call changes nothing.

Reference: diffusers' own UNet, which computes everything in each call, and the text encoders
without their cache. Tolerance: what that UNet is off by, see tests/tolerance.py.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch

from imaged.engine.nets.cached_unet import Unet
from imaged.engine.nets.cuda_graphs import CACHED_SHAPES, Graphs
from imaged.engine.nets.layers import Conv2d, Layer, _packs
from imaged.engine.prompt.encode import Encoded, PromptEncoder
from imaged.engine.scheduling.row_buckets import (
    RETRY_TRIAL_RATIO,
    RETRY_TRIAL_S,
    VerifiedBatchSizes,
    _later,
    agrees,
)
from tests.tolerance import difference, in_float64, rounding, summed

SEEN = 1e-3  # of the largest output: some thousand roundings
IDS = (192, 128, 0, 0, 192, 128)
TIMESTEPS = torch.tensor([999.0, 500.5, 1.0])


@pytest.fixture
def texts(nets: Any) -> tuple[Encoded, Encoded]:
    return PromptEncoder(nets).pair("a red house, (snowed mountains:1.2)", None)


@torch.inference_mode()
def plain(theirs: Any, x: torch.Tensor, text: Encoded) -> torch.Tensor:
    """The library's call, which keeps nothing: rows at the three timesteps."""
    rows = len(TIMESTEPS)
    out: torch.Tensor = theirs.unet(
        x,
        TIMESTEPS,
        encoder_hidden_states=text.context.to(x.dtype).expand(rows, -1, -1),
        added_cond_kwargs={
            "text_embeds": text.pooled.to(x.dtype).expand(rows, -1),
            "time_ids": torch.tensor(IDS, dtype=x.dtype).expand(rows, -1),
        },
        return_dict=False,
    )[0]
    return out


def ours(unet: Unet, x: torch.Tensor, text: Encoded) -> torch.Tensor:
    times = unet.times(TIMESTEPS, text, IDS)
    return unet(x, times, unet.stack_texts([unet.text(text)] * len(TIMESTEPS)))


@pytest.mark.parametrize("size", [(16, 24), (17, 13)], ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["prompt", "zeros"])
def test_kept_inputs_give_the_same_output(
    nets: Any, theirs: Any, texts: tuple[Encoded, Encoded], side: int, size: tuple[int, int]
) -> None:
    x = torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(1))
    before, kept = plain(theirs, x, texts[side]), ours(Unet(nets.unet), x, texts[side])
    with in_float64(theirs.unet):
        exact = plain(theirs, x.double(), texts[side])
    assert difference(kept, before) <= rounding(before, exact)


def test_recorded_calls_give_the_same_output(nets: Any, texts: tuple[Encoded, Encoded]) -> None:
    """On a CPU: the memory that recordings keep, not the recording."""
    plain_unet, unet = Unet(nets.unet), Unet(nets.unet, graphs=True)
    inputs = [torch.randn(3, 4, 16, 16) for _ in range(3)]
    made = [ours(unet, x, texts[n % 2]) for n, x in enumerate(inputs)]
    for n, x in enumerate(inputs):
        assert torch.equal(made[n], ours(plain_unet, x, texts[n % 2]))


def test_recordings_are_bounded_and_outputs_are_not_overwritten() -> None:
    calls = Graphs(lambda x, y: torch.add(x, y, out=memory[: len(x)]))
    memory = torch.zeros(2 * CACHED_SHAPES)
    one, two = (torch.full((1,), n) for n in (1.0, 2.0))
    first = calls(one, one)
    assert (float(calls(two, two)), float(first)) == (4.0, 2.0)
    for size in range(1, 2 * CACHED_SHAPES):
        calls(torch.ones(size), torch.ones(size))
    assert len(calls._recordings) == CACHED_SHAPES


def test_another_text_or_time_is_seen(nets: Any, texts: tuple[Encoded, Encoded]) -> None:
    unet, x = Unet(nets.unet), torch.randn(3, 4, 16, 16)
    one = ours(unet, x, texts[0])
    assert difference(ours(unet, x, texts[1]), one) > SEEN
    times = unet.times(TIMESTEPS.flip(0), texts[0], IDS)
    other = unet(x, times, unet.stack_texts([unet.text(texts[0])] * 3))
    assert difference(other, one) > SEEN


def test_kept_texts_are_the_encoders_own(nets: Any) -> None:
    encoder = PromptEncoder(nets)
    first, again = (encoder.pair("a blue boat", "trees") for _ in range(2))
    fresh = PromptEncoder(nets).pair("a blue boat", "trees")
    for kept, repeated, new in zip(first, again, fresh, strict=True):
        assert kept is repeated
        assert torch.equal(kept.context, new.context) and torch.equal(kept.pooled, new.pooled)


def test_kept_keys_and_values_are_bounded(nets: Any) -> None:
    from imaged.engine.nets.cached_unet import CACHED_TEXTS

    encoder, unet = PromptEncoder(nets), Unet(nets.unet)
    for n in range(2 * CACHED_TEXTS):
        unet.text(encoder.pair(f"{n} houses", None)[0])
    assert len(unet._texts) == CACHED_TEXTS


def one_row(unet: Unet, text: Encoded) -> tuple[torch.Tensor, ...]:
    return torch.randn(4, 16, 16), unet.times(TIMESTEPS, text, IDS)[0], unet.text(text)


def test_a_count_of_rows_that_changes_bits_is_not_trusted(
    nets: Any, texts: tuple[Encoded, Encoded]
) -> None:
    example = one_row(Unet(nets.unet), texts[0])

    class Wider(Unet):
        """Calls of more than two rows sum in another order: in their last bit."""

        def __call__(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            out = super().__call__(x, *rest)
            return torch.nextafter(out, out + 1) if len(x) > 2 else out

    assert not agrees(Wider(nets.unet), 4, example)
    assert not VerifiedBatchSizes().allow(Wider(nets.unet), "shape", 4, example)


def test_in_bfloat16_few_values_show_another_order_of_summing(
    nets: Any, texts: tuple[Encoded, Encoded]
) -> None:
    """One in 30,000, as of a last convolution that is summed in two halves."""
    draw = torch.Generator().manual_seed(1)

    class Wider(Unet):
        def __call__(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            out = super().__call__(x, *rest)
            if len(x) == 2:
                return out
            seen = torch.rand(out.shape, generator=draw) < 1 / 30_000
            return torch.where(seen, torch.nextafter(out, out + 1), out)

    unet = Wider(copy.deepcopy(nets.unet).bfloat16())
    example = (torch.randn(4, 16, 16), unet.times(TIMESTEPS, texts[0], IDS)[0], unet.text(texts[0]))
    example = (example[0].bfloat16(), *example[1:])
    assert not agrees(unet, 4, example)


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "recorded"])
def test_layers_that_change_bits_compute_in_pairs(
    nets: Any, texts: tuple[Encoded, Encoded], graphs: bool
) -> None:
    """Three layers, one of each kind, whose last bit depends on the number of rows."""

    def fickle(layer: Layer) -> None:
        plain = layer.plain

        def changing(*rows: torch.Tensor) -> torch.Tensor:
            out = plain(*rows)
            return torch.nextafter(out, out + 1) if len(rows[0]) > 2 else out

        layer.plain = changing  # type: ignore[method-assign]

    net = copy.deepcopy(nets.unet)
    example = one_row(Unet(net), texts[0])
    if not agrees(Unet(net), 8, example):
        pytest.skip("on this processor bits change by themselves")
    block = net.mid_block.attentions[0].transformer_blocks[0]
    layers = [block.ff.net[2], block.attn1.attend, net.down_blocks[0].resnets[0].conv1]
    for layer in layers:
        fickle(layer)
    unet, buckets = Unet(net, graphs=graphs), VerifiedBatchSizes()
    assert not agrees(unet, 4, example)
    assert buckets.allow(unet, "shape", 4, example)
    assert all(layer.in_pairs for layer in layers)  # and with one thread many small ones
    assert agrees(unet, 8, example)


@pytest.mark.parametrize(
    ("inputs", "outputs", "stride"), [(16, 16, 1), (64, 32, 1), (32, 64, 2), (4, 48, 1), (48, 4, 1)]
)
def test_a_packed_weight_gives_the_same_in_any_size(inputs: int, outputs: int, stride: int) -> None:
    torch.manual_seed(inputs)
    layer: Any = Conv2d(inputs, outputs, 3, stride, padding=1)  # torch has no types for this:
    layer.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for packs in (False, True, True):
            layer.packs = packs
            for rows, size in (
                (2, (8, 8)),
                (2, (16, 24)),
                (8, (8, 8)),
                (3, (17, 13)),
                (2, (64, 64)),
            ):
                x = torch.randn(rows, inputs, *size).to(memory_format=torch.channels_last)
                found = layer.double()(x.double())
                assert difference(layer.float()(x), found.float()) <= summed(9 * inputs)
                assert layer.packs is packs


@pytest.mark.skipif(not _packs(), reason="this PyTorch has no operators for packed weights")
def test_a_weight_that_has_changed_is_heard(nets: Any) -> None:
    """By a copy at once, and where it is said: whoever makes an engine says it."""
    layer, x = Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 8, 8)
    with torch.inference_mode():
        layer.packs = True
        before = layer(x)
        other = copy.deepcopy(layer)
        for changed in (other, layer):
            changed.weight.data = -changed.weight.data
            assert changed.bias is not None
            changed.bias.data = -changed.bias.data
        assert torch.allclose(other(x), -before, atol=1e-5)
        assert not torch.allclose(layer(x), -before, atol=1e-5)  # the mutant: nobody has said it
        layer.packs = True
        assert torch.allclose(layer(x), -before, atol=1e-5)
    layers = [m for m in Unet(copy.deepcopy(nets.unet)).net.modules() if isinstance(m, Conv2d)]
    assert {m.packs for m in layers if m.kernel_size == (3, 3)} == {True}


def test_a_trial_that_would_take_too_long_is_given_up(
    nets: Any, texts: tuple[Encoded, Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one call of two rows, and no layer is looked at for it; it may be tried again later,
    for a busy machine is not always one.
    """
    unet, calls = Unet(nets.unet), list[int]()
    example = torch.zeros(4, 16, 16), unet.times(TIMESTEPS, texts[0], IDS)[0], unet.text(texts[0])
    call = unet._call

    def counted(x: torch.Tensor, *rest: Any) -> Any:
        calls.append(len(x))
        return call(x, *rest)

    monkeypatch.setattr(unet, "_call", counted)
    monkeypatch.setattr(
        unet, "enable_paired_rows", lambda *_: pytest.fail("that takes longer still")
    )
    monkeypatch.setattr("imaged.engine.scheduling.row_buckets.MAX_TRIAL_S", 0.0)
    monkeypatch.setattr("imaged.engine.scheduling.row_buckets.JUDGE_AFTER_S", 0.0)
    buckets = VerifiedBatchSizes()
    assert agrees(unet, 4, example) is None
    assert not buckets.allow(unet, "shape", 4, example)
    buckets.tried = False
    assert not buckets.allow(unet, "shape", 4, example)
    assert calls == [2, 2]
    clock = time.monotonic
    monkeypatch.setattr("imaged.engine.scheduling.row_buckets.JUDGE_AFTER_S", 1e9)
    took_s = 30.0  # at most, here
    monkeypatch.setattr(
        "time.monotonic", lambda: clock() + RETRY_TRIAL_RATIO * took_s + RETRY_TRIAL_S
    )
    buckets.allow(unet, "shape", 4, example)
    assert len(calls) > 3


def test_what_was_in_vain_is_seldom_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial of SDXL on a CPU is a call of many seconds, in which nothing else is done."""
    monkeypatch.setattr("time.monotonic", lambda: 1014.0)
    assert _later(1000.0) == 1014.0 + 100 * 14.0
    assert _later(1013.9) == 1014.0 + RETRY_TRIAL_S
