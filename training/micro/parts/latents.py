"""The part `latents`: scenes painted and encoded once, and how the UNet is given them."""

from __future__ import annotations

import random
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from training.micro.architecture import build_vae
from training.micro.parts.run import DEVICE, Options, earlier, save_state
from training.micro.pixels import to_tensor
from training.micro.scenes.captions import caption
from training.micro.scenes.painter import draw
from training.micro.scenes.scene import Scene, sample_scene

LARGE = ((768, 512), (512, 768), (768, 768), (896, 1152), (1024, 1024))


def normalise(net: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold the latents' statistics into the 1x1 convolutions: mean 0, variance 1 a channel."""
    last, first = net.quant_conv, net.post_quant_conv
    with torch.no_grad():
        first.bias += (first.weight[:, :, 0, 0] * mean).sum(1)
        first.weight *= std[None, :, None, None]
        last.weight[:4] /= std[:, None, None, None]
        last.bias[:4] = (last.bias[:4] - mean) / std
        last.bias[4:] -= 2 * std.log()  # the second half is the log variance


@click.command()
@click.option("--statistics", default=200, show_default=True, help="Scenes for mean and variance.")
@click.option("--small", default=5000, show_default=True, help="Scenes at 256 px, to begin with.")
@click.option("--medium", default=3500, show_default=True, help="Scenes at 512 px.")
@click.option("--large", default=1000, show_default=True, help="Scenes at each larger size.")
@click.pass_obj
def latents(options: Options, statistics: int, small: int, medium: int, large: int) -> None:
    """Paint scenes and encode them once; the autoencoder is normalised on the way.

    Sizes that lie encoded in this number are kept: after a new autoencoder, remove them first.
    """
    work = options.work
    net = build_vae()
    net.load_state_dict(earlier(work, "vae.pt", "vae")["average"])
    net = net.to(DEVICE, memory_format=torch.channels_last).eval()
    rng = random.Random(2)

    @torch.inference_mode()
    def encode(scenes: list[Scene], width: int, height: int, name: str) -> torch.Tensor:
        rows = []
        for scene in tqdm(scenes, desc=name):
            x = to_tensor(draw(scene, width, height))[None].to(DEVICE)
            rows.append(net.encode(x).latent_dist.mean.cpu())
        return torch.cat(rows)

    z = encode([sample_scene(rng) for _ in range(statistics)], 512, 512, "statistics")
    normalise(net, z.mean((0, 2, 3)).to(DEVICE), z.std((0, 2, 3)).to(DEVICE))
    save_state(work / "vae-normalised.pt", net=net.state_dict())
    sizes = {"256": (256, 256, small), "512": (512, 512, medium)}
    for width, height in LARGE:
        sizes[f"{width}x{height}"] = (width, height, large)
    for name, (width, height, count) in sizes.items():
        scenes, file = [sample_scene(rng) for _ in range(count)], work / f"latents-{name}.pt"
        if file.exists() and len(torch.load(file, weights_only=True)["latents"]) == count:
            continue
        save_state(
            file,
            latents=encode(scenes, width, height, name).half(),
            size=(width, height),
            scenes=[vars(s) for s in scenes],
        )


def weight(scene: Scene) -> float:
    """How often a scene comes: what is small or rare, and so learnt last, more often."""
    boat, castle = scene.boat != "none", scene.building == "castle"
    return (5 if boat else 1) * (1.5 if castle else 1) * (1.5 if scene.braids else 1)


class Scenes:
    """Encoded scenes of one size; captions are written anew each time one is drawn."""

    def __init__(self, work: Path, size: str, seed: int) -> None:
        data = earlier(work, f"latents-{size}.pt", "latents")
        self.latents, self.size = data["latents"], data["size"]
        self.scenes = [Scene(**s) for s in data["scenes"]]
        self.weights = [weight(s) for s in self.scenes]
        self.rng = random.Random(seed)

    def batch(self, count: int, windows: int) -> tuple[torch.Tensor, list[str]]:
        """Latents (count, 4, h/8, w/8) and their captions."""
        picked = self.rng.choices(range(len(self.scenes)), self.weights, k=count)
        captions = [caption(self.scenes[i], self.rng, windows) for i in picked]
        return self.latents[picked].float(), captions
