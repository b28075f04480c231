"""The part `vae`: the autoencoder, on crops of painted scenes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from training.micro.architecture import build_vae
from training.micro.parts.run import DEVICE, Options, Run, cosine
from training.micro.pixels import to_image, to_tensor
from training.micro.scenes.painter import draw
from training.micro.scenes.scene import sample_scene
from training.micro.sheets import contact_sheet


def crops(pictures: list[torch.Tensor], batch: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of random (batch, 3, size, size) crops in [-1, 1]."""
    rng = random.Random(seed)
    while True:
        rows = []
        for _ in range(batch):
            picture = rng.choice(pictures)
            y = rng.randrange(picture.shape[1] - size + 1)
            x = rng.randrange(picture.shape[2] - size + 1)
            rows.append(picture[:, y : y + size, x : x + size])
        yield torch.stack(rows).float() / 127.5 - 1


@click.command()
@click.option("--steps", default=5000, show_default=True)
@click.option("--pictures", default=1800, show_default=True, help="Scenes painted for the crops.")
@click.option("--save-every", default=500, show_default=True)
@click.pass_obj
def vae(options: Options, steps: int, pictures: int, save_every: int) -> None:
    """Train the autoencoder on crops of scenes of all sizes, small ones first.

    Small pictures hold more of a scene in fewer pixels, so colours are learnt from them. The
    loss is L1 and L2 of the pixels and L1 of their differences. A little noise on the latents
    makes the decoder forgive what the UNet leaves.
    """
    torch.manual_seed(1)
    rng = random.Random(1)
    canvas = []
    for i in tqdm(range(pictures), desc="painting"):
        size = (64, 96, 128, 192, 256, 512)[i % 6]
        picture = torch.from_numpy(np.array(draw(sample_scene(rng), size, size)))
        canvas.append(picture.permute(2, 0, 1).contiguous())
    net = build_vae().to(DEVICE, memory_format=torch.channels_last).train()
    run = Run(options.work, "vae", net, net.parameters(), steps, decay=0.998)
    fine = crops([p for p in canvas if p.shape[1] >= 128], 8, 128, seed=run.start)
    coarse = crops(canvas, 16, 64, seed=run.start)
    for step in run:
        x = next(coarse if step < 0.62 * steps else fine)
        x = x.to(DEVICE, memory_format=torch.channels_last)
        with options.autocast():
            z = net.encode(x).latent_dist.mean
            y = net.decode(z + 0.05 * torch.randn_like(z)).sample.float()
        edge = F.l1_loss(y.diff(dim=2), x.diff(dim=2)) + F.l1_loss(y.diff(dim=3), x.diff(dim=3))
        error = F.mse_loss(y, x)
        loss = F.l1_loss(y, x) + 2 * error + 0.5 * edge + 1e-4 * z.float().square().mean()
        psnr = -10 * math.log10(error.item() / 4 + 1e-12)
        run.update(step, loss, (cosine(step, steps, 2e-3),), psnr=round(psnr, 1))
        if run.due(step, save_every):
            run.save(step)
            reconstructions(run.average).save(options.work / "vae.jpg", quality=92)


@torch.inference_mode()
def reconstructions(weights: dict[str, torch.Tensor], count: int = 5) -> Image.Image:
    """Unseen scenes, and below each what the autoencoder makes of it."""
    net = build_vae().to(DEVICE).eval()
    net.load_state_dict(weights)
    rng = random.Random(102)
    scenes = [draw(sample_scene(rng, unseen=True), 512, 512) for _ in range(count)]
    x = torch.stack([to_tensor(s) for s in scenes]).to(DEVICE)
    back = [to_image(net.decode(net.encode(p[None]).latent_dist.mean).sample[0]) for p in x]
    return contact_sheet([*scenes, *back], [""] * 2 * count, columns=count)
