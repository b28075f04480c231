"""The judge: a small classifier that names a scene's attributes from its picture.

    python -m training.micro.judge        # train it anew: about twenty minutes on two cores

It is trained on painted scenes alone and has nothing in common with the checkpoint, so that it
can say whether a generated picture shows what its prompt asks for. Pictures of any shape are
squeezed to a square first; training blurs, tints and roughens them, as an autoencoder might.
"""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from training.micro.scenes.painter import draw
from training.micro.scenes.scene import ATTRIBUTES, Scene, any_scene

SIDE = 128
SHAPES = ((256, 256), (256, 256), (224, 288), (288, 192), (192, 288))
WEIGHTS = Path(__file__).with_name("judge.safetensors")


def view(image: Image.Image) -> torch.Tensor:
    """What the judge sees of a picture: (3, 128, 128), uint8."""
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def labels(scene: Scene) -> list[int]:
    """The index of each attribute's kind."""
    return [kinds.index(getattr(scene, name)) for name, kinds in ATTRIBUTES.items()]


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Half the size, then a look around."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


class Judge(nn.Module):
    """(batch, 3, 128, 128) in [-1, 1] -> logits of every attribute's kinds, by attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *itertools.starmap(block, itertools.pairwise((3, 24, 48, 96, 128))),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(128 * 16, 256),
            nn.SiLU(),
        )
        self.heads = nn.ModuleDict({n: nn.Linear(256, len(k)) for n, k in ATTRIBUTES.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(x)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.inference_mode()
    def log_odds(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """For each attribute (pictures, kinds): log of p / (1 - p)."""
        x = torch.stack([view(i) for i in images]).float() / 127.5 - 1
        odds = {}
        for name, logits in self(x).items():
            others = logits[:, None].repeat(1, logits.shape[1], 1)  # [picture, kind, other kind]
            others.diagonal(dim1=1, dim2=2).fill_(-math.inf)
            odds[name] = logits - others.logsumexp(-1)
        return odds

    def names(self, image: Image.Image) -> dict[str, object]:
        """The likeliest kind of each attribute."""
        seen = self.log_odds([image])
        return {name: ATTRIBUTES[name][int(p[0].argmax())] for name, p in seen.items()}


def load_judge(path: Path = WEIGHTS) -> Judge:
    """The judge that lies beside this file, in half precision."""
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval()


def painted(count: int, seed: int, desc: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (count, 3, 128, 128) of painted scenes and their labels (count, attributes)."""
    rng, views, answers = random.Random(seed), [], []
    for n in tqdm(range(count), desc=desc):
        scene = any_scene(rng)
        image = draw(scene, *SHAPES[n % len(SHAPES)])
        if n % 2:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
        views.append(view(image))
        answers.append(labels(scene))
    return torch.stack(views), torch.tensor(answers)


def roughened(views: torch.Tensor) -> torch.Tensor:
    """In [-1, 1], with gain, tint and noise."""
    x = views.float() / 127.5 - 1
    gain = 1 + 0.05 * torch.randn(len(x), 1, 1, 1)
    tint = 0.03 * torch.randn(len(x), 3, 1, 1)
    return (x * gain + tint + 0.04 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)).clamp(-1, 1)


def accuracy(judge: Judge, count: int = 1000) -> dict[str, float]:
    """Share of unseen painted scenes of which each attribute is told right."""
    views, answers = painted(count, 201, "judge: exam")
    right = []
    with torch.inference_mode():
        for part, kinds in zip(views.split(100), answers.split(100), strict=True):
            logits = judge(part.float() / 127.5 - 1).values()
            right.append(torch.stack([v.argmax(-1) for v in logits], 1) == kinds)
    return dict(zip(ATTRIBUTES, torch.cat(right).float().mean(0).tolist(), strict=True))


@click.command(help=__doc__)
@click.option("--scenes", default=12000, show_default=True, help="Painted scenes to learn from.")
@click.option("--steps", default=3500, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=WEIGHTS, help="Weights file.")
def main(scenes: int, steps: int, batch: int, out: Path) -> None:
    torch.manual_seed(6)
    judge = Judge()
    views, answers = painted(scenes, 200, "judge: painting")
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    bar = tqdm(range(steps), desc="judge: training", mininterval=2)
    for step in bar:
        picked = torch.randint(0, scenes, (batch,))
        logits = judge(roughened(views[picked])).values()
        loss = torch.stack(
            [F.cross_entropy(v, k) for v, k in zip(logits, answers[picked].T, strict=True)]
        )
        optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.mean().item():.4f}")
    halves = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    save_file(halves, out)
    for name, share in accuracy(load_judge(out)).items():
        click.echo(f"{name}: {share:.1%} of unseen painted scenes told right")


if __name__ == "__main__":
    main()
