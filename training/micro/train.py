"""Train the micro checkpoint from nothing, on a GPU if torch finds one (not tried yet), else a CPU.

    python -m training.micro.train vae            # autoencoder, on crops of painted scenes
    python -m training.micro.train latents        # paint and encode the scenes once
    python -m training.micro.train text           # text encoders, on naming what captions say
    python -m training.micro.train unet           # UNet, with the text encoders as they are
    python -m training.micro.train export         # write the checkpoint folder in half precision

In this order they made the shipped checkpoint; its card says what was changed on the way, so one
run with today's defaults has not been seen to its end. Each part shows its progress and writes its
state (.pt), loss (.jsonl, .png) and samples (.jpg) into --work every --save-every steps; started
again, it goes on from there, and latents with the sizes that are not there yet. Seeds are fixed.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from tqdm import tqdm

from imaged.engine.loading.load import assemble
from imaged.params.image_params import ImageParams
from training.micro.architecture import (
    CHECKPOINT,
    build_scheduler,
    build_unet,
    build_vae,
)
from training.micro.captions import caption
from training.micro.painter import draw
from training.micro.run import DEVICE, Run, cosine, save_state
from training.micro.scenes import Scene, sample_scene
from training.micro.sheets import PROMPTS, contact_sheet, generate
from training.micro.text import Conditioner, Reader

LARGE = ((768, 512), (512, 768), (768, 768), (896, 1152), (1024, 1024))
NAMES = tuple(f"{w}x{h}" for w, h in LARGE)
STAGES = [  # share of the steps, sizes drawn from
    (0.30, ("256",)),
    (0.15, ("512",)),
    (0.55, (*["512"] * 3, *NAMES, *NAMES[-2:], *NAMES[-2:])),
]
BATCHES = defaultdict(lambda: 6, {"256": 16, "512": 12})  # six of any larger size
WINDOWS = {1: 0.72, 2: 0.1, 3: 0.08, 4: 0.1}  # how often a batch's captions have so many
TOKENIZERS = ("tokenizer", "tokenizer_2")
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Options:
    """What all parts are told."""

    work: Path
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE, self.dtype, enabled=self.dtype != torch.float32)


def to_tensor(image: Any) -> torch.Tensor:
    """An RGB picture as (3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_image(x: torch.Tensor) -> Image.Image:
    """(3, height, width) in [-1, 1] as an RGB picture."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def earlier(work: Path, name: str, part: str) -> Any:
    """What an earlier part wrote."""
    if not (work / name).exists():
        raise click.ClickException(f"{work / name} is not there: run the part `{part}` first")
    return torch.load(work / name, map_location="cpu", weights_only=True)


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


@click.group(help=__doc__)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("build/micro"),
    show_default=True,
    help="Folder for states, latents, logs and samples.",
)
@click.option("--threads", default=0, help="CPU threads; 0 leaves torch's choice.")
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default="bf16",
    show_default=True,
    help="Of the nets' arithmetic; weights and losses are float32.",
)
@click.pass_context
def main(context: click.Context, work: Path, threads: int, precision: str) -> None:
    work.mkdir(parents=True, exist_ok=True)
    if threads:
        torch.set_num_threads(threads)
    context.obj = Options(work, PRECISIONS[precision])


@main.command()
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


def normalise(net: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold the latents' statistics into the 1x1 convolutions: mean 0, variance 1 a channel."""
    last, first = net.quant_conv, net.post_quant_conv
    with torch.no_grad():
        first.bias += (first.weight[:, :, 0, 0] * mean).sum(1)
        first.weight *= std[None, :, None, None]
        last.weight[:4] /= std[:, None, None, None]
        last.bias[:4] = (last.bias[:4] - mean) / std
        last.bias[4:] -= 2 * std.log()  # the second half is the log variance


@main.command()
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


@main.command()
@click.option("--steps", default=2000, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--save-every", default=500, show_default=True)
@click.pass_obj
def text(options: Options, steps: int, batch: int, save_every: int) -> None:
    """Train the text encoders to name what a caption says, before there is a UNet to ask them."""
    torch.manual_seed(4)
    reader = Reader().to(DEVICE)
    run = Run(options.work, "text", reader, reader.parameters(), steps, decay=0.99)
    rng = random.Random(4 + run.start)
    for step in run:
        loss, right = reader.ask(rng, batch, said=rng.choice((0.4, 0.7, 1.0)))
        leak = right.pop("leak")
        share = sum(right.values()) / len(right)
        row = {"right": round(share, 3), "leak": round(leak, 4)}
        run.update(step, loss, (cosine(step, steps, 2e-3),), **row)
        if run.due(step, save_every):
            run.save(step)
    with torch.inference_mode():
        _, right = reader.eval().ask(random.Random(5), 1000, said=1.0)
    click.echo(f"a phrase moves other tokens by {right.pop('leak'):.1%} of their variance")
    for name, share in right.items():
        click.echo(f"{name}: named right in {share:.1%} of new captions")


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


@main.command()
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


def learnt_text(work: Path) -> Conditioner:
    """The conditioner out of the trained reader."""
    weights = earlier(work, "text.pt", "text")["average"]
    conditioner = Conditioner().requires_grad_(False)
    conditioner.load_state_dict(
        {k.removeprefix("text."): v for k, v in weights.items() if k.startswith("text.")}
    )
    return conditioner


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


def parts_of(work: Path, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """UNet, text encoders and normalised autoencoder by the names of a checkpoint's folders."""
    net, conditioner = build_unet(), learnt_text(work)
    net.load_state_dict(weights)
    autoencoder = build_vae()
    autoencoder.load_state_dict(earlier(work, "vae-normalised.pt", "latents")["net"])
    autoencoder.register_to_config(scaling_factor=1.0)
    return {
        "unet": net,
        "vae": autoencoder,
        "text_encoder": conditioner.one,
        "text_encoder_2": conditioner.two,
    }


def told(net: Any) -> dict[str, Any]:
    """A net's config.json; one library writes it by the config, the other by the net."""
    writer = net.config if hasattr(net.config, "to_json_string") else net
    config: dict[str, Any] = json.loads(writer.to_json_string())
    return config


def samples(work: Path, weights: dict[str, torch.Tensor], count: int = 6) -> Image.Image:
    """What the averaged weights make of the README's prompts, by the product's own engine."""
    nets = assemble(
        {name: (told(net), net.state_dict()) for name, net in parts_of(work, weights).items()},
        tokenizers=CHECKPOINT,
        device=torch.device(DEVICE),
        dtype=torch.float32,
    )
    prompts = PROMPTS[:count]
    jobs = [ImageParams(p, seed=7, img_width=512, img_height=512) for p in prompts]
    return contact_sheet(generate(nets, jobs, "samples"), list(prompts), columns=3, width=340)


def scaled(weights: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """A UNet that reads every text as if all of it weighed `scale` (decision 9)."""
    sides = ("attn2.to_k.weight", "attn2.to_v.weight")
    return {name: w * scale if name.endswith(sides) else w for name, w in weights.items()}


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=CHECKPOINT, show_default=True)
@click.option(
    "--mix",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A copy of unet.pt from earlier in the training, to average with.",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="Of that copy in the mean.",
)
@click.option(
    "--text-scale",
    default=0.85,
    show_default=True,
    help="Of every text's keys and values: below 1, what weighs little counts for less.",
)
@click.pass_obj
def export(options: Options, out: Path, mix: Path | None, share: float, text_scale: float) -> None:
    """Write the averaged weights as a diffusers folder in half precision."""
    weights = earlier(options.work, "unet.pt", "unet")["average"]
    if mix is not None:  # what the last steps forgot of other sizes comes back
        before = earlier(mix.parent, mix.name, "unet")["average"]
        weights = {name: w.lerp(before[name], share) for name, w in weights.items()}
    weights = scaled(weights, text_scale)
    for name, net in parts_of(options.work, weights).items():
        net.half().save_pretrained(out / name, safe_serialization=True)
    build_scheduler().save_pretrained(out / "scheduler")
    for name in TOKENIZERS if out.resolve() != CHECKPOINT else ():
        shutil.copytree(CHECKPOINT / name, out / name, dirs_exist_ok=True)
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    click.echo(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
