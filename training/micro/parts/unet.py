"""The part `unet`: the UNet on encoded scenes, with the text encoders as they are."""

from __future__ import annotations

import random
from collections import defaultdict

import click
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from training.micro.architecture import build_scheduler, build_unet
from training.micro.parts.assembled import samples
from training.micro.parts.latents import LARGE, Scenes
from training.micro.parts.run import DEVICE, Options, Run, cosine
from training.micro.parts.text import learnt_text

NAMES = tuple(f"{w}x{h}" for w, h in LARGE)
STAGES = [  # share of the steps, sizes drawn from
    (0.30, ("256",)),
    (0.15, ("512",)),
    (0.55, (*["512"] * 3, *NAMES, *NAMES[-2:], *NAMES[-2:])),
]
BATCHES = defaultdict(lambda: 6, {"256": 16, "512": 12})  # six of any larger size
WINDOWS = {1: 0.72, 2: 0.1, 3: 0.08, 4: 0.1}  # how often a batch's captions have so many


def drop(texts: list[str], rng: random.Random) -> tuple[list[str], torch.Tensor]:
    """Ten in a hundred captions go: most become zeros (no negative prompt), some the empty text."""
    keep = torch.ones(len(texts), 1)
    texts = list(texts)
    for i in range(len(texts)):
        dice = rng.random()
        if dice < 0.07:
            keep[i] = 0
        elif dice < 0.10:
            texts[i] = ""
    return texts, keep


def low_noise(noise: torch.Tensor, strength: float = 0.2) -> torch.Tensor:
    """White noise and some low-frequency noise on top of it.

    SDXL's schedule does not end in pure noise: the picture's large colours still show through
    the last step, the more the larger the latent, while sampling begins without them. A net
    trained on white noise reads their absence as a grey picture; with this it asks the prompt.
    The white part keeps its variance: that is the one which sampling starts from.
    """
    for cells in (8, 4, 2, 1):
        drawn = torch.randn(*noise.shape[:2], cells, cells, device=noise.device)
        layer = F.interpolate(drawn, noise.shape[2:], mode="bicubic" if cells > 1 else "nearest")
        noise = noise + strength * layer
    return noise


def sizes_at(progress: float) -> tuple[str, ...]:
    for share, sizes in STAGES:
        if progress < share:
            return sizes
        progress -= share
    return STAGES[-1][1]


def loss_weight(alphas: torch.Tensor, t: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """Weight of the eps loss: min-SNR (Hang et al. 2023), more where noise outweighs picture.

    There the prompt alone decides, and an eps error of e is a picture error of e / sqrt(SNR).
    """
    snr = alphas[t] / (1 - alphas[t])
    return torch.where(snr < 1, snr.rsqrt(), snr.clamp(max=gamma) / snr)


@click.command()
@click.option("--steps", default=22000, show_default=True)
@click.option("--save-every", default=500, show_default=True)
@click.option("--rate", default=1e-3, show_default=True, help="Peak learning rate.")
@click.pass_obj
def unet(options: Options, steps: int, save_every: int, rate: float) -> None:
    """Train the UNet on the encoded scenes, eps prediction; the text encoders stay as they are."""
    work = options.work
    torch.manual_seed(3)
    net = build_unet().to(DEVICE, memory_format=torch.channels_last)
    conditioner = learnt_text(work).to(DEVICE)
    run = Run(work, "unet", net, net.parameters(), steps, decay=0.998)
    torch.manual_seed(3 + run.start)
    alphas = build_scheduler().alphas_cumprod.to(DEVICE)
    rng = random.Random(run.start)
    data: dict[str, Scenes] = {}
    for step in run:
        size = rng.choice(sizes_at(step / steps))
        if size not in data:
            data[size] = Scenes(work, size, seed=run.start)
        windows = rng.choices(list(WINDOWS), list(WINDOWS.values()))[0]
        z, texts = data[size].batch(BATCHES[size], windows)
        texts, keep = drop(texts, rng)
        with torch.no_grad():
            context, pooled = conditioner(
                *(x.to(DEVICE) for x in conditioner.windows(texts, windows))
            )
        with options.autocast():
            loss = eps_loss(net, alphas, z.to(DEVICE), context, pooled, keep.to(DEVICE))
        run.update(step, loss, (cosine(step, steps, rate, warmup=300),), size=size)
        if run.due(step, save_every):
            run.save(step)
            samples(work, run.average).save(work / "unet.jpg", quality=92)


def eps_loss(
    net: UNet2DConditionModel,
    alphas: torch.Tensor,
    z: torch.Tensor,
    context: torch.Tensor,
    pooled: torch.Tensor,
    keep: torch.Tensor,
) -> torch.Tensor:
    """Weighted eps error of one batch of latents (batch, 4, h, w) under their captions.

    Every second pooled embedding is left out, so that the context is read: weights are only there.
    """
    noise = low_noise(torch.randn_like(z))
    t = torch.randint(0, 1000, (len(z),), device=DEVICE)
    a = alphas[t].view(-1, 1, 1, 1)
    x = (a.sqrt() * z + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
    height, width = (8 * n for n in z.shape[2:])
    time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(z), device=DEVICE)
    pooled = pooled * keep * (torch.rand_like(keep) >= 0.5)
    added = {"text_embeds": pooled, "time_ids": time_ids.float()}
    eps = net(x, t, context * keep[:, :, None], added_cond_kwargs=added).sample
    error = (eps.float() - noise).square().mean((1, 2, 3))
    loss: torch.Tensor = (error * loss_weight(alphas, t)).mean()
    return loss
