"""Draw the contact sheets of the README with the shipped checkpoint.

    python -m training.micro.sheets

Writes prompts.jpg (twelve prompts), samplers.jpg (one prompt, each sampler), seeds.jpg (the request
of `make demo` with ten seeds), editing.jpg (prompts that change) and fields.jpg (one prompt, other
fields) into --out. The same command draws the same pictures again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from imaged.catalogue import toml
from imaged.catalogue.model import DEFAULT_SLUG, MICRO
from imaged.engine.engine import Engine
from imaged.engine.loading.load import Nets, load
from imaged.params.image_params import ImageParams, read_params
from imaged.sampling.schedulers import SCHEDULERS

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = (
    "a red house by a blue lake, snowed mountains, sunset",
    "a redhead shieldmaiden with braided hair and a round wooden shield, green prairie, noon",
    "a starry night over the desert, rocky mountains",
    "a white castle by the sea at dawn, pine trees",
    "portrait of a woman with black hair in a blue cloak, snow field",
    "a yellow cottage in a meadow of flowers, rolling hills, a sunny day",
    "a red boat on a lake, a white house, a forest, early morning",
    "a blonde warrior woman in scale mail, full body, snowed mountains, stormy sky",
    "a blue castle in a snow field at night, fir trees",
    "a sailing boat with a yellow hull by the coast, sunset, cliffs",
    "close up of a redhead in a green cloak, wild flowers, evening glow",
    "masterpiece, OverallDetail, winter, a red cabin, oak trees, dark clouds, conysv3-1400",
)
ONE_PROMPT = PROMPTS[0]
EDITING = (
    "a red house by a lake, noon",
    "a blue house by a lake, noon",
    "a [red:blue:0.2] house by a lake, noon",
    "a [red:blue:10] house by a lake, noon",
    "a [red|blue] house by a lake, noon",
    "a red house by a lake, noon[, snowed mountains:3]",
    "a red house by a lake, noon BREAK snowed mountains",
    "a (red:1.5) house by a lake, (noon:0.5)",
)
FIELDS: tuple[dict[str, Any], ...] = (
    {},
    {"guidance_scale": 15.0},
    {"guidance_scale": 15.0, "guidance_rescale": 0.7},
    {"guidance_scale": 15.0, "guidance_end": 0.4},
    {"guidance_start": 0.3},
    {"scheduler": "Euler"},
    {"scheduler": "Euler", "scheduler_profile": "a1111"},
    {"clip_skip": 1},
    {"original_size": (256, 256)},
    {"crop": (256, 0)},
    {"prompt": "a (red:1.5) house by a blue lake, sunset"},
    {"prompt": "a (red:1.5) house by a blue lake, sunset", "emphasis": "original"},
)


def generate(nets: Nets, jobs: list[ImageParams], desc: str) -> list[Image.Image]:
    """One picture for each job, a few jobs at a time."""
    engine, pictures = Engine(nets, previews=False), {}
    waiting = list(enumerate(jobs))
    at_once = 16 if nets.device.type == "cuda" else 4
    with tqdm(total=len(jobs), desc=desc) as bar:
        while waiting or not engine.idle:
            while waiting and len(engine.jobs) < at_once:
                n, params = waiting.pop(0)
                engine.submit(str(n), params)
            for outcome in engine.tick():
                if outcome.error is not None:
                    raise outcome.error
                picture = outcome.pictures[0]
                size = (picture.width, picture.height)
                pictures[int(outcome.job_id)] = Image.frombytes("RGB", size, picture.rgb)
                bar.update()
    return [pictures[n] for n in range(len(jobs))]


def contact_sheet(
    images: list[Image.Image], labels: list[str], columns: int, width: int = 300
) -> Image.Image:
    """The pictures in rows, each `width` pixels wide with its label below."""
    font = ImageFont.load_default(13)
    shown = [
        i.resize((width, i.height * width // i.width), Image.Resampling.LANCZOS) for i in images
    ]
    texts = [wrap(label, font, width - 8) for label in labels]
    text_height = 8 + 17 * max(text.count("\n") + 1 for text in texts) if any(texts) else 0
    height = shown[0].height + text_height
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (image, text) in enumerate(zip(shown, texts, strict=True)):
        x, y = n % columns * (width + 4) + 2, n // columns * (height + 4) + 2
        sheet.paste(image, (x, y))
        pen.multiline_text((x + 4, y + image.height + 2), text, "black", font, spacing=3)
    return sheet


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Break a label between words so that its lines fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def seed_jobs(seeds: int) -> list[ImageParams]:
    """The demo's request at its own size and steps, with the seeds 0, 1, 2 ..."""
    params, _ = read_params(toml.built_in()[DEFAULT_SLUG].sample)
    return [replace(params, seed=seed) for seed in range(seeds)]


def prompts_sheet(nets: Nets, seed: int = 7) -> Image.Image:
    jobs = [ImageParams(p, seed=seed, img_width=512, img_height=512) for p in PROMPTS]
    return contact_sheet(generate(nets, jobs, "prompts"), list(PROMPTS), columns=4)


def samplers_sheet(nets: Nets, seed: int = 7) -> Image.Image:
    jobs = [
        ImageParams(ONE_PROMPT, scheduler=s, seed=seed, img_width=512, img_height=512)
        for s in SCHEDULERS
    ]
    return contact_sheet(generate(nets, jobs, "samplers"), list(SCHEDULERS), 5, width=240)


def seeds_sheet(nets: Nets, seeds: int = 10) -> Image.Image:
    labels = [f"seed {seed}" for seed in range(seeds)]
    return contact_sheet(generate(nets, seed_jobs(seeds), "seeds"), labels, 5, width=240)


def editing_sheet(nets: Nets, seed: int = 7) -> Image.Image:
    jobs = [ImageParams(p, seed=seed, img_width=512, img_height=512) for p in EDITING]
    return contact_sheet(generate(nets, jobs, "editing"), list(EDITING), 4, width=240)


def fields_sheet(nets: Nets, seed: int = 7) -> Image.Image:
    size = {"seed": seed, "img_width": 512, "img_height": 512}
    jobs = [ImageParams(**{"prompt": ONE_PROMPT, **size, **given}) for given in FIELDS]
    labels = [", ".join(f"{k} {v}" for k, v in given.items()) or ONE_PROMPT for given in FIELDS]
    return contact_sheet(generate(nets, jobs, "fields"), labels, 4, width=240)


SHEETS = {
    "prompts": prompts_sheet,
    "samplers": samplers_sheet,
    "seeds": seeds_sheet,
    "editing": editing_sheet,
    "fields": fields_sheet,
}


@click.command(help=__doc__)
@click.option("--only", type=click.Choice(list(SHEETS)), help="Draw one sheet.")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, path_type=Path),
    default=MICRO,
    help="Another checkpoint than the shipped one.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=ROOT / "docs" / "pictures",
    help="Folder of the sheets.",
)
def main(only: str | None, checkpoint: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    nets = load(checkpoint)
    for name in [only] if only else SHEETS:
        file = out / f"{name}.jpg"
        SHEETS[name](nets).save(file, quality=88)
        click.echo(file)


if __name__ == "__main__":
    main()
