"""Single steps: our engine's tick against the same step made of diffusers' parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.app import Effort
from bench.ceiling import fastest, synchronise
from bench.figures import Row
from bench.gpu.sides import STEPS, Bench, agreed, job
from bench.rounds import Spread, compare, each_round
from bench.sides import peer
from imaged.engine.engine import Engine

WARM, COUNT = 5, 20  # steps before those that are timed, and of those


def engine_step(bench: Bench, pixels: int, images: int, count: int) -> float:
    """Milliseconds in which each of `images` pictures advances by one guided UNet call."""
    engine = bench.engine
    for n in range(images):
        engine.submit(str(n), job(pixels, n))
    for _ in range(WARM):
        engine.tick()
    synchronise(bench.device)
    before, started = _calls(engine), time.perf_counter()
    for _ in range(count):
        engine.tick()
    synchronise(bench.device)
    taken, advanced = time.perf_counter() - started, _calls(engine) - before
    for n in range(images):
        engine.cancel(str(n))
    engine.tick()
    return 1000 * taken * images / advanced


def _calls(engine: Engine) -> int:
    return sum(made.calls for made in engine.progress().values())


@torch.inference_mode()
def peer_step(pipe: Any, pixels: int, images: int, count: int, apart: bool = False) -> float:
    """Milliseconds of the pipeline's loop a step: scale, UNet, guidance, scheduler.

    apart: the conditional and the unconditional half in two calls, as some servers do.
    """
    step, device = loop(pipe, pixels, images, apart), torch.device(pipe.device)
    for i in range(WARM):
        step(i)
    synchronise(device)
    started = time.perf_counter()
    for i in range(WARM, WARM + count):
        step(i)
    synchronise(device)
    return 1000 * (time.perf_counter() - started) / count


def loop(pipe: Any, pixels: int, images: int, apart: bool) -> Callable[[int], None]:
    """A function that makes step i of a denoising with random conditioning."""
    unet, device = pipe.unet, pipe.device
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS, device=device)
    inputs = conditioning(unet, 2 * images)
    side = pixels // pipe.vae_scale_factor
    latents = torch.randn(images, unet.config.in_channels, side, side, device=device)
    state = {"x": latents.to(unet.dtype) * scheduler.init_noise_sigma}

    def step(i: int) -> None:
        t = scheduler.timesteps[i]
        x = scheduler.scale_model_input(torch.cat([state["x"]] * 2), t)
        if apart:
            halves = [_part(inputs, half, images) for half in (0, 1)]
            out = torch.cat(
                [forward(unet, x[:images], t, halves[0]), forward(unet, x[images:], t, halves[1])]
            )
        else:
            out = forward(unet, x, t, inputs)
        plain, prompted = out.chunk(2)
        state["x"] = scheduler.step(
            plain + 8.0 * (prompted - plain), t, state["x"], return_dict=False
        )[0]

    return step


Inputs = dict[str, torch.Tensor]


def conditioning(unet: Any, rows: int) -> Inputs:
    """Random context (rows, 77, width), pooled text (rows, width) and sizes (rows, 6)."""
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    shapes = {"context": (77, config.cross_attention_dim), "pooled": (pooled,), "sizes": (6,)}
    return {
        name: torch.randn(rows, *shape, device=unet.device, dtype=unet.dtype)
        for name, shape in shapes.items()
    }


def _part(inputs: Inputs, half: int, images: int) -> Inputs:
    return {name: rows[half * images : (half + 1) * images] for name, rows in inputs.items()}


def forward(unet: Any, x: torch.Tensor, t: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    added = {"text_embeds": inputs["pooled"], "time_ids": inputs["sizes"]}
    out: torch.Tensor = unet(
        x,
        t,
        encoder_hidden_states=inputs["context"],
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return out


@torch.inference_mode()
def flops(pipe: Any, pixels: int) -> float:
    """FLOP of one guided step of one picture, as torch counts them."""
    unet, side = pipe.unet, pixels // pipe.vae_scale_factor
    x = torch.randn(2, unet.config.in_channels, side, side, device=unet.device, dtype=unet.dtype)
    with FlopCounterMode(display=False) as counter:
        forward(unet, x, torch.tensor(500.0, device=unet.device), conditioning(unet, 2))
    return float(counter.get_total_flops())


def one_step(bench: Bench, effort: Effort) -> list[Row]:
    """Milliseconds a step, then the share of the device's matrix rate that ours attains."""
    bench.agreed = agreed(bench, effort.choose(20, 4))
    pixels, count = bench.pixels, effort.choose(COUNT, 2)
    peers: list[tuple[str, Any, bool]] = [(name, pipe, False) for name, pipe in bench.peers()]
    peers.insert(1, ("diffusers, halves apart", bench.eager, True))
    rows: list[Row] = []
    ours: list[float] = []
    for name, pipe, apart in peers:
        pair = compare(
            each_round(engine_step, bench, pixels, 1, count),
            each_round(peer_step, pipe, pixels, 1, count, apart),
            effort.rounds,
            name,
        )
        ours += pair.ours
        target = 1.15 if name.endswith("compiled") else None
        rows.append(Row.of(f"one CFG step, {pixels} px", "ms", "lower", name, pair, target))
    limit = 24.0 if bench.cuda else None
    rows.insert(0, Row(f"one CFG step, {pixels} px", "ms", ours=Spread.of(ours), limit=limit))
    return [*rows, _attained(bench, ours)]


def _attained(bench: Bench, step_ms: Sequence[float]) -> Row:
    work = flops(bench.eager, bench.pixels)
    [rate] = [v for k, v in bench.ceilings.items() if "matmul" in k]
    bench.ceilings["TFLOP of one CFG step"] = work / 1e12
    shares = Spread.of(work / (rate * 1e9) / (ms / 1000) for ms in step_ms)
    limit = 0.65 if bench.cuda else None
    return Row("share of the matmul rate attained", "", "higher", shares, limit=limit)


def by_batch(bench: Bench, effort: Effort) -> list[Row]:
    """Steps of pictures a second at each size and number of pictures."""
    name, pipe = bench.peers()[-1]
    count, rows = effort.choose(COUNT, 2), []
    for pixels in bench.pick([512, 768, 1024], [512]):
        for images in bench.pick([1, 2, 4, 8], [1, 2]):
            pair = compare(
                each_round(engine_rate, bench, pixels, images, count),
                each_round(loop_rate, pipe, pixels, images, count),
                effort.rounds,
                f"{pixels} px, {images}:",
            )
            what = f"{pixels} px, {images} at once"
            rows.append(Row.of(what, "picture steps/s", "higher", name, pair))
    return rows


def engine_rate(bench: Bench, pixels: int, images: int, count: int) -> float:
    return 1000 * images / engine_step(bench, pixels, images, count)


def loop_rate(pipe: Any, pixels: int, images: int, count: int) -> float:
    return 1000 * images / peer_step(pipe, pixels, images, count)


@torch.inference_mode()
def vae_decode(bench: Bench, effort: Effort) -> list[Row]:
    """The engine's VAE as it was loaded, against diffusers' in float32 and, on a GPU, compiled."""
    side = bench.pixels // bench.nets.vae_scale_factor
    latent = torch.randn(1, bench.nets.channels, side, side, device=bench.device)
    plain = peer.pipeline(bench.folder, bench.device.type).vae.float()
    peers: list[tuple[str, Any, float | None]] = [("diffusers, float32", plain, 4.0)]
    if bench.cuda:
        vae = bench.compiled.vae
        vae.decode = torch.compile(vae.decode)
        peers.append(("diffusers, bfloat16 compiled", vae, None))
    limit = 25.0 if bench.cuda else None
    rows, repeats = [], effort.choose(10, 1)
    for name, vae, target in peers:
        pair = compare(
            each_round(_ms, bench.nets.vae, latent.to(bench.nets.vae.dtype), repeats),
            each_round(_ms, vae.decode, latent.to(vae.dtype), repeats),
            effort.rounds,
            name,
        )
        row = Row.of(f"VAE decode, {bench.pixels} px", "ms", "lower", name, pair, target)
        rows.append(row)
    ours = rows[0].ours
    return [Row(f"VAE decode, {bench.pixels} px", "ms", ours=ours, limit=limit), *rows]


def _ms(decode: Callable[[torch.Tensor], Any], z: torch.Tensor, repeats: int) -> float:
    return 1000 * fastest(lambda: decode(z), z.device, repeats)
