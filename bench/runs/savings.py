"""What is saved by computing once what stays the same from call to call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.app import Effort, any_model_option, effort_options, main
from bench.figures import Row, publish
from bench.rounds import compare, each_round, seconds_each
from bench.sides.models import checkpoint
from imaged.catalogue.model import MICRO
from imaged.engine.loading.load import Nets

PEERS = {
    "UNet call": "diffusers' UNet",
    "UNet call without a negative prompt": "our own call",
    "prompt": "both text encoders",
}


@main.command()
@any_model_option
@effort_options(seconds=1)
def savings(names: tuple[str, ...], effort: Effort) -> None:
    """One UNet call of a guided picture of 512 px: the engine's against diffusers'.

    The engine's has keys and values of the text, and what the residual blocks add for time, size
    and pooled text, from before; tests hold the outputs together. Kept prompts are a row of
    their own: both text encoders against a look into the cache.
    """
    import torch

    from bench.ceiling import ceilings
    from imaged.engine.loading.load import load

    torch.set_num_threads(effort.threads)
    found = ceilings(torch.device("cpu"))
    rows: list[Row] = []
    for name in names:
        folder = MICRO if name == "micro" else checkpoint(name)
        nets = load(folder, torch.device("cpu"))
        for what, ours, plain in (
            ("UNet call", *calls(nets, folder)),
            ("UNet call without a negative prompt", *shortened(nets)),
            ("prompt", *prompts(nets)),
        ):
            ours(), plain()  # warm
            pair = compare(
                each_round(seconds_each, ours, effort.seconds),
                each_round(seconds_each, plain, effort.seconds),
                effort.rounds,
                f"{name}: {what}",
            )
            peer = PEERS[what]
            rows.append(Row.of(f"{name}: {what}", "s", "lower", peer, pair))
    publish("savings", effort, rows, found)


def calls(nets: Nets, folder: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same two rows through either way."""
    import torch
    from diffusers import UNet2DConditionModel

    from imaged.engine.nets.cached_unet import Unet
    from imaged.engine.prompt.encode import PromptEncoder

    unet, sizes = Unet(nets.unet), (512, 512, 0, 0, 512, 512)
    library = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    library.to(memory_format=torch.channels_last)
    texts = PromptEncoder(nets).pair("a red house by a lake", None)
    time = torch.tensor([500.0])
    x = torch.randn(2, nets.channels, 512 // nets.vae_scale_factor, 512 // nets.vae_scale_factor)
    times = torch.cat([unet.times(time, text, sizes) for text in texts])
    crowd = unet.stack_texts([unet.text(text) for text in texts])
    added = {
        "text_embeds": torch.stack([text.pooled for text in texts]),
        "time_ids": torch.tensor([sizes, sizes], dtype=torch.float32),
    }
    context = torch.stack([text.context for text in texts])

    def plain() -> Any:
        with torch.inference_mode():
            return library(
                x,
                time.expand(2),
                encoder_hidden_states=context,
                added_cond_kwargs=added,
                return_dict=False,
            )

    return lambda: unet(x, times, crowd), plain


def shortened(nets: Nets) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A call whose negative row has a text of zeros: without its cross-attention, which then gives
    the bias of its last layer, and with it as the engine has it.
    """
    import torch

    from imaged.engine.nets.cached_unet import Unet
    from imaged.engine.prompt.encode import PromptEncoder

    unet, sizes = Unet(nets.unet), (512, 512, 0, 0, 512, 512)
    first, positive = PromptEncoder(nets).pair("a red house by a lake", None)
    texts = (replace(first, context=torch.zeros_like(first.context)), positive)
    x = torch.randn(2, nets.channels, 512 // nets.vae_scale_factor, 512 // nets.vae_scale_factor)
    times = torch.cat([unet.times(torch.tensor([500.0]), text, sizes) for text in texts])
    crowd = unet.stack_texts([unet.text(text) for text in texts])
    attentions = nets.unet.cross_attentions()
    plain = [attention.forward for attention in attentions]

    def without(attention: Any, whole: Any) -> Callable[..., Any]:
        def forward(h: Any, given: Any) -> Any:
            keys, values = given
            bias = attention.to_out[0].bias.expand(1, *h.shape[1:])
            return torch.cat([bias, whole(h[1:], (keys[1:], values[1:]))])

        return forward

    short = [without(*pair) for pair in zip(attentions, plain, strict=True)]

    def call(forwards: list[Any]) -> Any:
        for attention, forward in zip(attentions, forwards, strict=True):
            setattr(attention, "forward", forward)  # noqa: B010 (a method, of one module)
        return unet(x, times, crowd)

    torch.testing.assert_close(call(short), call(plain), rtol=1e-3, atol=1e-4)
    return lambda: call(short), lambda: call(plain)


def prompts(nets: Nets) -> tuple[Callable[[], Any], Callable[[], Any]]:
    from imaged.engine.prompt.encode import PromptEncoder

    encoder, text = PromptEncoder(nets), "a red house by a lake"
    return lambda: encoder.pair(text, None), lambda: PromptEncoder(nets).pair(text, None)
