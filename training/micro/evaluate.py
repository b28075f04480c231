"""Measure a micro checkpoint against its bars; the tables go into its model card.

    python -m training.micro.evaluate                  # hours on two cores
    python -m training.micro.evaluate --prompts 20     # a first look

Prompts are told from scenes whose attributes are combined as in no picture of the training, with
every attribute named; the judge (judge.py) says which of them the pictures show. What is measured
is kept in --work by the hash of checkpoint and judge: started again, it goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from imaged.catalogue.model import MICRO
from imaged.engine.loading.load import load
from imaged.params.image_params import ImageParams
from imaged.sampling.schedulers import SCHEDULERS
from training.micro.judge import WEIGHTS, accuracy, load_judge
from training.micro.parts.text import SAYS
from training.micro.pixels import to_tensor
from training.micro.scenes.captions import (
    BOAT,
    DRESS,
    GROUND,
    HAIR,
    HOUSE,
    MOUNTAINS,
    TIME,
    choose,
    noise,
    tell,
)
from training.micro.scenes.painter import draw
from training.micro.scenes.scene import ATTRIBUTES, COLOURS, sample_scene
from training.micro.sheets import generate, seed_jobs

SIZES = ("512x512", "768x768", "1024x1024", "896x1152")
GUIDANCES = (1.0, 4.0, 7.0, 12.0)
START, END = "<!-- figures -->", "<!-- end of figures -->"
Marks = dict[str, list[int]]  # attribute -> [right, asked]

# prompt -> the attribute that it leaves open
OPEN = {
    "a green prairie, snowed mountains": "time",
    "noon, snowed mountains": "ground",
    "noon, a green prairie": "mountains",
    "by the sea, pine trees": "time",
    "a woman on a green prairie, noon": "hair",
    "a redhead by the sea": "dress",
}
SYNONYMS: dict[str, Mapping[str, tuple[str, ...]]] = {
    "time": TIME,
    "mountains": MOUNTAINS,
    "ground": GROUND,
    "hair": HAIR,
    "dress": DRESS,
}
# attribute -> (kind -> phrase that is weighted, the rest of the prompt)
WEIGHED: dict[str, tuple[dict[str, str], str]] = {
    "time": ({k: v[0] for k, v in TIME.items()}, "a woman, a green prairie"),
    "ground": ({k: v[0] for k, v in GROUND.items()}, "noon, pine trees"),
    "hair": ({k: v[1] for k, v in HAIR.items()}, "a woman, a green prairie"),
    "dress": ({k: v[0] for k, v in DRESS.items()}, "a woman, a green prairie"),
    "walls": ({c: HOUSE[0].format(c) for c in COLOURS}, "a green prairie, noon"),
    "boat": ({c: BOAT[0].format(c) for c in COLOURS}, "by the sea, noon"),
}


class Exam:
    """The same held-out prompts, asked again and again under different conditions."""

    def __init__(self, checkpoint: Path, prompts: int) -> None:
        self.checkpoint, self.nets, self.judge = checkpoint, load(checkpoint), load_judge()
        rng = random.Random(103)
        self.scenes = [sample_scene(rng, unseen=True) for _ in range(prompts)]
        self.told = [choose(s, rng, 1.0) for s in self.scenes]
        self.jobs = [
            ImageParams(tell(s, t, rng), seed=1000 + n, img_width=512, img_height=512)
            for n, (s, t) in enumerate(zip(self.scenes, self.told, strict=True))
        ]

    def ask(self, desc: str, count: int, **changes: Any) -> dict[str, Any]:
        """Marks of one picture for each of the first `count` prompts, and what burnt out."""
        jobs = [replace(job, **changes) for job in self.jobs[:count]]
        return self.mark(generate(self.nets, jobs, desc))

    def mark(self, images: list[Image.Image]) -> dict[str, Any]:
        marks: Marks = {name: [0, 0] for name in ATTRIBUTES}
        for scene, told, image in zip(self.scenes, self.told, images, strict=False):
            seen = self.judge.names(image)
            for name in (n for phrase in told for n in SAYS.get(phrase, (phrase,))):
                marks[name][0] += seen[name] == getattr(scene, name)
                marks[name][1] += 1
        return {"marks": marks, "clipped": sum(map(clipped, images)) / len(images)}

    def ask_noisily(self, count: int) -> dict[str, Any]:
        """With words around the prompt that the checkpoint does not know."""
        rng = random.Random(105)
        jobs = [
            replace(j, prompt=", ".join([*noise(rng, 6), j.prompt, *noise(rng, 10)]))
            for j in self.jobs[:count]
        ]
        return self.mark(generate(self.nets, jobs, "unknown words"))

    def vae_psnr(self, size: int, count: int) -> float:
        """Mean PSNR in dB of unseen scenes through the autoencoder and back."""
        rng, total = random.Random(102), 0.0
        vae = AutoencoderKL.from_pretrained(self.checkpoint, subfolder="vae").to(self.nets.device)
        for _ in tqdm(range(count), desc="autoencoder"):
            x = to_tensor(draw(sample_scene(rng, unseen=True), size, size))[None]
            x = x.to(self.nets.device)
            with torch.inference_mode():
                y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
            total += -10 * math.log10(float((y - x).square().mean()) / 4)
        return total / count

    def negative(self, prompt: str, seeds: int) -> list[Any]:
        """[negative prompt, pictures that show what it names without it, and with it].

        The negative prompt names what most of the pictures show of the attribute left open.
        """
        name = OPEN[prompt]

        def kinds(negative: str | None) -> Counter[object]:
            jobs = [
                ImageParams(prompt, negative, seed=n, img_width=512, img_height=512)
                for n in range(seeds)
            ]
            images = generate(self.nets, jobs, f"negative: {negative}")
            return Counter(self.judge.names(i)[name] for i in images)

        before = kinds(None)
        kind = max(SYNONYMS[name], key=lambda k: before[k])
        negative = ", ".join(SYNONYMS[name][kind][:2])
        return [negative, before[kind], kinds(negative)[kind]]

    def weights(self, pairs: int) -> list[int]:
        """[pairs in which (words:1.4) scores above (words:0.6) with the judge, pairs].

        The score is the judge's log odds: probabilities near 1 can no longer be told apart.
        """
        rng, jobs, asked = random.Random(104), [], []
        for n in range(pairs):
            name = rng.choice(tuple(WEIGHED))
            kinds, rest = WEIGHED[name]
            kind = rng.choice(tuple(kinds))
            asked.append((name, ATTRIBUTES[name].index(kind)))
            for weight in ("0.6", "1.4"):
                words = f"{rest}, ({kinds[kind]}:{weight})"
                jobs.append(ImageParams(words, seed=n, img_width=512, img_height=512))
        images, right = generate(self.nets, jobs, "weights"), 0
        for n, (name, index) in enumerate(asked):
            low, high = self.judge.log_odds(images[2 * n : 2 * n + 2])[name][:, index]
            right += bool(high > low)
        return [right, pairs]

    def request(self, seeds: int) -> list[dict[str, Any]]:
        """What the judge sees in the demo's request with each seed."""
        return [self.judge.names(i) for i in generate(self.nets, seed_jobs(seeds), "request")]


def clipped(image: Image.Image) -> float:
    """Share of channel values at either end of the scale: what burning out looks like."""
    pixels = np.asarray(image)
    return float(((pixels == 0) | (pixels == 255)).mean())


def share(marks: Marks) -> float:
    return sum(r for r, _ in marks.values()) / sum(n for _, n in marks.values())


def row(name: str, marks: Marks) -> str:
    cells = [f"{r / n:.0%}" if n else "" for r, n in marks.values()]
    return f"| {name} | **{share(marks):.1%}** | {' | '.join(cells)} |"


class Kept:
    """Results by name in a JSON file, so that hours of measuring survive a stop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.results:
            self.results[name] = make()
            self.path.write_text(json.dumps(self.results, indent=1))
        return self.results[name]


def report(exam: Exam, kept: Kept, prompts: int) -> list[str]:
    """The card's lines of figures."""
    few, seeds = max(1, prompts // 5), max(4, prompts * 3 // 25)
    lines = heading(exam, kept, prompts, few)

    def add(name: str, count: int, make: Callable[[], Any] | None = None, **changes: Any) -> float:
        """A row of the table; one that asks what another asked is not asked again."""
        p = replace(exam.jobs[0], **changes)
        asked = f"{p.img_width}x{p.img_height}; {p.scheduler}; {p.guidance_scale:g}"
        result = kept(
            f"{count}; {name if make else asked}",
            make or partial(exam.ask, name, count, **changes),
        )
        lines.append(row(name, result["marks"]))
        tqdm.write(lines[-1])
        clipped_share: float = result["clipped"]
        return clipped_share

    for size in SIZES:
        width, height = (int(n) for n in size.split("x"))
        add(size, prompts, img_width=width, img_height=height)
    for name in SCHEDULERS:
        add(name, few, scheduler=name)
    burnt = [add(f"guidance {g:g}", few, guidance_scale=g) for g in GUIDANCES]
    add("unknown words", few, partial(exam.ask_noisily, few))
    lines += [
        "",
        "Colour values clipped at black or white, at guidance "
        + ", ".join(f"{g:g}: {b:.2%}" for g, b in zip(GUIDANCES, burnt, strict=True))
        + ".",
        "",
        f"| prompt, {seeds} seeds | negative | shown before | shown after |",
        "|---|---|---|---|",
    ]
    for prompt in OPEN:
        result = kept(f"{seeds}; {prompt}", partial(exam.negative, prompt, seeds))
        lines.append(f"| {prompt} | {' | '.join(map(str, result))} |")
    return [*lines, *ending(exam, kept, prompts)]


def heading(exam: Exam, kept: Kept, prompts: int, few: int) -> list[str]:
    """Of the table, with the judge's own row."""
    psnr = kept("psnr 200", lambda: exam.vae_psnr(512, 200))
    exact = kept("judge", lambda: accuracy(exam.judge))
    return [
        f"Autoencoder: {psnr:.1f} dB PSNR, mean of 200 unseen scenes at 512 px.",
        "",
        f"Attributes shown as the prompt says, {prompts} held-out prompts at each size, "
        f"{few} in the other rows (512 x 512); default sampler, 25 steps, guidance 7 but where "
        "the row says otherwise. The judge: 1,000 painted scenes.",
        "",
        f"| | all | {' | '.join(ATTRIBUTES)} |",
        f"|---|---|{'---|' * len(ATTRIBUTES)}",
        f"| judge | **{sum(exact.values()) / len(exact):.1%}** | "
        f"{' | '.join(f'{v:.1%}' for v in exact.values())} |",
    ]


def ending(exam: Exam, kept: Kept, prompts: int) -> list[str]:
    """Emphasis, and the demo's request."""
    right, pairs = kept(f"{prompts}; weights", lambda: exam.weights(prompts))
    seen = kept("request 10", lambda: exam.request(10))
    return [
        "",
        f"(words:1.4) scores above (words:0.6) with the judge in {right} of {pairs} pairs.",
        "",
        "The demo's request (896 x 1152, 30 steps) with ten seeds, by the judge: "
        + ", ".join(
            f"{n} {sum(s[n] in kinds for s in seen)} of {len(seen)}" for n, kinds in WANTED.items()
        )
        + f"; all of these {sum(all(s[n] in k for n, k in WANTED.items()) for s in seen)}.",
    ]


WANTED: dict[str, tuple[object, ...]] = {  # what the demo's request asks for
    "hair": ("red",),
    "shield": (True,),
    "ground": ("prairie", "flowers"),
    "mountains": ("snowed",),
}


def into_card(card: Path, lines: list[str]) -> None:
    """Replace what stands between the card's two marks."""
    text = card.read_text() if card.exists() else f"{START}\n{END}\n"
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    card.write_text("\n".join([head + START, *lines, END + tail]))


@click.command(help=__doc__)
@click.option("--prompts", default=200, show_default=True, help="Held-out prompts at each size.")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=MICRO,
    help="Folder of the checkpoint; the shipped one unless given.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("build/micro"),
    show_default=True,
    help="Folder where results are kept.",
)
def main(prompts: int, checkpoint: Path, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    weights = hashlib.sha256()
    for file in [*sorted(checkpoint.rglob("*.safetensors")), WEIGHTS]:
        weights.update(file.read_bytes())
    kept = Kept(work / f"evaluation-{weights.hexdigest()[:8]}.json")
    lines = report(Exam(checkpoint, prompts), kept, prompts)
    into_card(checkpoint / "README.md", lines)
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
