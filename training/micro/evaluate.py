"""Judge the micro checkpoint, and draw the sheet that the README shows.

    python -m training.micro.evaluate            # figures: autoencoder, adherence to the prompt
    python -m training.micro.evaluate --sheet docs/pictures/prompts.jpg

The judge of adherence knows nothing of the checkpoint: it compares the mean colours of a coarse
grid with those of painted scenes (nearest neighbour) and so tells time of day and ground. Its own
accuracy on painted scenes that it has not seen is printed beside the checkpoint's.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import click
import torch
from PIL import Image
from tqdm import tqdm

from imaged.catalogue import MICRO
from imaged.engine.decode import Picture
from imaged.engine.engine import Engine
from imaged.engine.load import Nets, load
from imaged.params import ImageParams
from training.micro.captions import PHRASES
from training.micro.scenes import Scene, draw, sample_scene
from training.micro.train import to_tensor

GRID = (8, 4)  # cells across and down that the judge looks at
PROMPTS = (
    "a red house by a blue lake, snowed mountains, sunset",
    "a green prairie, snowed mountains, noon",
    "a desert at night, rocky mountains",
    "a white house by the sea, dawn, pine trees",
    "a yellow house in a snow field, storm",
    "masterpiece, wild flowers, rolling hills, oak trees, sunrise, OverallDetail",
)


def generate(nets: Nets, jobs: list[ImageParams], desc: str) -> list[Picture]:
    """One picture for each job, a few jobs at a time."""
    engine, pictures = Engine(nets), {}
    waiting = list(enumerate(jobs))
    with tqdm(total=len(jobs), desc=desc) as bar:
        while waiting or not engine.idle:
            while waiting and len(engine.jobs) < 4:
                n, params = waiting.pop(0)
                engine.submit(str(n), params)
            for outcome in engine.tick():
                if outcome.error is not None:
                    raise outcome.error
                pictures[int(outcome.job_id)] = outcome.pictures[0]
                bar.update()
    return [pictures[n] for n in range(len(jobs))]


def as_image(picture: Picture) -> Image.Image:
    return Image.frombytes("RGB", (picture.width, picture.height), picture.rgb)


def look(image: Image.Image) -> torch.Tensor:
    """What the judge sees: the mean colours of the grid's cells."""
    return to_tensor(image.resize(GRID, Image.Resampling.BOX)).flatten()


class Judge:
    """Tells (time, ground) of a picture by the nearest of many painted scenes."""

    def __init__(self, scenes: int = 4000) -> None:
        rng = random.Random(100)
        self.scenes = [sample_scene(rng) for _ in range(scenes)]
        self.views = torch.stack([look(draw(s, 96, 96)) for s in tqdm(self.scenes, desc="judge")])

    def __call__(self, image: Image.Image) -> tuple[str, str]:
        nearest = int((self.views - look(image)).square().sum(1).argmin())
        return self.scenes[nearest].time, self.scenes[nearest].ground

    def accuracy(self, count: int = 500) -> tuple[float, float]:
        """Share of unseen painted scenes of which time and ground are told right."""
        rng = random.Random(101)
        unseen = [sample_scene(rng) for _ in range(count)]
        told = [(s, self(draw(s, 96, 96))) for s in unseen]
        return (
            sum(s.time == time for s, (time, _) in told) / count,
            sum(s.ground == ground for s, (_, ground) in told) / count,
        )


def vae_psnr(nets: Nets, size: int, count: int) -> float:
    """Mean PSNR in dB of unseen scenes through the autoencoder and back."""
    rng, total = random.Random(102), 0.0
    for _ in tqdm(range(count), desc="autoencoder"):
        x = to_tensor(draw(sample_scene(rng), size, size))[None].to(nets.device)
        with torch.inference_mode():
            y = nets.vae.decode(nets.vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        total += -10 * math.log10(float((y - x).square().mean()) / 4)
    return total / count


def prompt_of(scene: Scene, rng: random.Random) -> str:
    parts = [rng.choice(PHRASES[name][getattr(scene, name)]) for name in ("ground", "time")]
    if scene.mountains != "none":
        parts.append(rng.choice(PHRASES["mountains"][scene.mountains]))
    rng.shuffle(parts)
    return ", ".join(parts)


def adherence(nets: Nets, judge: Judge, size: str, count: int) -> tuple[float, float]:
    """Share of prompts whose time and whose ground the judge finds in the picture."""
    rng = random.Random(103)
    scenes = [sample_scene(rng) for _ in range(count)]
    width, height = (int(n) for n in size.split("x"))
    jobs = [
        ImageParams(prompt_of(s, rng), seed=1000 + n, img_width=width, img_height=height)
        for n, s in enumerate(scenes)
    ]
    told = [judge(as_image(p)) for p in generate(nets, jobs, size)]
    pairs = list(zip(scenes, told, strict=True))
    return (
        sum(s.time == time for s, (time, _) in pairs) / count,
        sum(s.ground == ground for s, (_, ground) in pairs) / count,
    )


def draw_sheet(nets: Nets, path: Path, size: int = 512, shown: int = 320) -> None:
    """Six prompts, three beside three."""
    jobs = [ImageParams(p, seed=7, img_width=size, img_height=size) for p in PROMPTS]
    sheet = Image.new("RGB", (3 * shown, 2 * shown))
    for n, picture in enumerate(generate(nets, jobs, "sheet")):
        small = as_image(picture).resize((shown, shown), Image.Resampling.LANCZOS)
        sheet.paste(small, (n % 3 * shown, n // 3 * shown))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=90)


@click.command(help=__doc__)
@click.option("--sheet", type=click.Path(path_type=Path), help="Draw the sheet only.")
@click.option("--prompts", default=40, show_default=True, help="Pictures at each size.")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    default=("512x512", "768x768", "1024x1024", "896x1152"),
    show_default=True,
)
@click.option("--scenes", default=50, show_default=True, help="Scenes for the autoencoder.")
def main(sheet: Path | None, prompts: int, sizes: tuple[str, ...], scenes: int) -> None:
    nets = load(MICRO)
    if sheet is not None:
        draw_sheet(nets, sheet)
        return
    judge = Judge()
    lines = [f"autoencoder, {scenes} unseen scenes at 512 px: {vae_psnr(nets, 512, scenes):.1f} dB"]
    rows = [("painted scenes (the judge itself)", judge.accuracy())]
    rows += [(f"{prompts} prompts at {s}", adherence(nets, judge, s, prompts)) for s in sizes]
    lines += [f"{name}: time of day {t:.0%}, ground {g:.0%}" for name, (t, g) in rows]
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
