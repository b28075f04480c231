"""What bfloat16 is worth on a CPU, from the smallest UNet to SDXL's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click
import torch

from bench.app import Effort, effort_options, main
from bench.figures import Row, publish
from bench.rounds import compare, each_round, seconds_each
from bench.sides.models import SEED, SHAPES, Shape, checkpoint
from imaged.catalogue.model import MICRO

PIXELS, FACTOR = 512, 8  # of SDXL's VAE
#: SDXL's UNet, narrower: what lies between micro and it.
NARROW = {
    f"sdxl/{part}": replace(
        SHAPES["full"],
        channels=(320 // part, 640 // part, 1280 // part),
        heads=(max(1, 5 // part), 10 // part, 20 // part),
    )
    for part in (10, 5, 2)
}
NETS = ("thin", "micro", "wide", *NARROW, "full")
PICTURES = ("micro", "wide")  # whose nets are quick enough for whole pictures


@main.command()
@click.option(
    "--model",
    "names",
    multiple=True,
    type=click.Choice(NETS),
    default=NETS,
    show_default=True,
    help="UNet; may be given several times.",
)
@effort_options()
def bf16(names: tuple[str, ...], effort: Effort) -> None:
    """A guided step of 512 px on the CPU: the UNet in bfloat16 against float32.

    SDXL's own UNet and narrower ones with random weights; 18 GB of memory for the largest. Of two
    checkpoints also how far whole pictures are apart, the VAE in float32 either way.
    """
    from bench.ceiling import ceilings

    torch.set_num_threads(effort.threads)
    found: dict[str, float] = {}
    for kind in (torch.float32, torch.bfloat16):
        found |= ceilings(torch.device("cpu"), kind)
    rows: list[Row] = []
    agreement: dict[str, float] = {}
    for name in names:
        rows.append(compared(name, effort))
    for name in (n for n in names if n in PICTURES):
        agreement |= apart(name, effort.choose(20, 2))
    publish("bf16", effort, rows, found, agreement)


def compared(name: str, effort: Effort) -> Row:
    plain = unet_of(name)
    size = sum(weight.numel() for weight in plain.parameters()) / 1e6
    halves, full = (step(net) for net in (_in_bf16(plain), plain))
    halves(), full()  # warm
    what = f"{name}, {size:.3g} M parameters"
    pair = compare(
        each_round(seconds_each, halves, effort.seconds),
        each_round(seconds_each, full, effort.seconds),
        effort.rounds,
        what,
    )
    return Row.of(what, "s", "lower", "float32", pair)


def unet_of(name: str) -> Any:
    from imaged.engine.loading.load import load
    from imaged.engine.nets.unet import UNetConfig, UNetModel

    if name == "micro":
        return load(MICRO, torch.device("cpu")).unet
    shape: Shape = NARROW.get(name) or SHAPES[name]
    torch.manual_seed(SEED)
    net: Any = UNetModel(UNetConfig.read(shape.unet()))
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _in_bf16(net: Any) -> Any:
    """Beside the first, weight by weight: a copy in float32 would be a third of the memory more."""
    with torch.device("meta"):
        other: Any = type(net)(net.config)
    halves = {name: weight.bfloat16() for name, weight in net.state_dict().items()}
    other.load_state_dict(halves, assign=True)
    return other.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def step(net: Any) -> Callable[[], Any]:
    """A call of two rows, as a guided picture's every step is."""
    from imaged.engine.nets.cached_unet import Unet
    from imaged.engine.prompt.encode import Encoded

    unet, config, sizes = Unet(net), net.config, (PIXELS, PIXELS, 0, 0, PIXELS, PIXELS)
    draw = torch.Generator().manual_seed(SEED)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    cells = PIXELS // FACTOR
    texts = [
        Encoded(
            torch.randn(77, config.cross_attention_dim, generator=draw),
            torch.randn(pooled, generator=draw),
        )
        for _ in range(2)
    ]
    times = torch.cat([unet.times(torch.tensor([500.0]), text, sizes) for text in texts])
    crowd = unet.stack_texts([unet.text(text) for text in texts])
    x = torch.randn(2, config.in_channels, cells, cells, generator=draw)
    return lambda: unet(x, times, crowd)


def apart(name: str, steps: int) -> dict[str, float]:
    """How far whole pictures are from those in float32, in levels of 255: mean and largest."""
    from imaged.engine.engine import Engine
    from imaged.engine.loading.load import load
    from imaged.params.image_params import ImageParams

    folder = MICRO if name == "micro" else checkpoint(name)
    plain = load(folder, torch.device("cpu"))
    texts = {
        part: load(folder, torch.device("cpu")).__dict__[part].bfloat16()
        for part in ("text_encoder", "text_encoder_2")
    }
    drawn = []
    for nets in (plain, replace(plain, unet=_in_bf16(plain.unet), **texts)):
        engine = Engine(nets, previews=False)
        for n, prompt in enumerate(
            ("a red house by a blue lake", "a boat", "a woman, snow", "dawn")
        ):
            engine.submit(
                str(n),
                ImageParams(
                    prompt, seed=n, num_inference_steps=steps, img_width=PIXELS, img_height=PIXELS
                ),
            )
        outcomes = []
        while not engine.idle:
            outcomes += engine.tick()
        rgb = b"".join(o.pictures[0].rgb for o in sorted(outcomes, key=lambda o: o.job_id))
        drawn.append(torch.frombuffer(bytearray(rgb), dtype=torch.uint8).float())
    levels = (drawn[0] - drawn[1]).abs()
    return {f"{name}, mean": float(levels.mean()), f"{name}, largest": float(levels.max())}
