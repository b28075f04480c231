"""Train the micro checkpoint from nothing, on a CPU or a GPU.

    python -m training.micro.train vae            # autoencoder, on crops of painted scenes
    python -m training.micro.train latents        # paint and encode the scenes once
    python -m training.micro.train text           # text encoders, on naming what captions say
    python -m training.micro.train unet           # UNet and both text encoders together
    python -m training.micro.train export         # write the checkpoint folder in half precision

Started again, vae and unet go on from their last --save-every steps and latents with the sizes
that are not there yet; text, which takes minutes, begins anew. Seeds are fixed; on the
same machine with the same threads a run repeats.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from training.micro.architecture import (
    CHECKPOINT,
    EOS,
    POOLED_WIDTH,
    TEXT_WIDTH,
    build_scheduler,
    build_text_encoders,
    build_unet,
    build_vae,
    load_tokenizer,
)
from training.micro.captions import PHRASES, caption, vocabulary
from training.micro.scenes import Scene, draw, sample_scene

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Average:
    """Exponential moving average of a net's weights: what is shipped."""

    def __init__(self, nets: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in nets.state_dict().items()}

    def update(self, nets: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in nets.state_dict().items():
            if value.dtype.is_floating_point:
                self.weights[name].lerp_(value.detach(), 1 - decay)


def to_tensor(image: Any) -> torch.Tensor:
    """An RGB picture as (3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def cosine(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Learning rate: linear warm-up, then a half cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    x = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, x))))


def save_state(path: Path, **state: Any) -> None:
    """Write, then rename: a run that is killed while saving keeps its last state."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def log(work: Path, part: str, **row: float) -> None:
    with (work / f"{part}.jsonl").open("a") as f:
        f.write(json.dumps(row) + "\n")


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
    help="folder for states, latents and logs",
)
@click.option("--threads", default=0, help="CPU threads; 0 leaves torch's choice")
@click.pass_context
def main(context: click.Context, work: Path, threads: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    if threads:
        torch.set_num_threads(threads)
    context.obj = work


@main.command()
@click.option("--steps", default=3600, show_default=True)
@click.option("--pictures", default=1200, show_default=True, help="scenes painted for the crops")
@click.option("--save-every", default=300, show_default=True)
@click.pass_obj
def vae(work: Path, steps: int, pictures: int, save_every: int) -> None:
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
        canvas.append(
            torch.from_numpy(np.array(draw(sample_scene(rng), size, size)))
            .permute(2, 0, 1)
            .contiguous()
        )
    net = build_vae().to(DEVICE, memory_format=torch.channels_last).train()
    average = Average(net, 0.998)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.99))
    start = 0
    state_file = work / "vae.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights, start = state["average"], state["step"]
    large = [picture for picture in canvas if picture.shape[1] >= 128]
    fine = crops(large, 8, 128, seed=start)
    coarse = crops(canvas, 16, 64, seed=start)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="vae", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, 2e-3)
        x = next(coarse if step < 0.62 * steps else fine)
        x = x.to(DEVICE, memory_format=torch.channels_last)
        with torch.autocast(DEVICE, torch.bfloat16):
            z = net.encode(x).latent_dist.mean
            y = net.decode(z + 0.05 * torch.randn_like(z)).sample.float()
        edge = F.l1_loss(y.diff(dim=2), x.diff(dim=2)) + F.l1_loss(y.diff(dim=3), x.diff(dim=3))
        error = F.mse_loss(y, x)
        loss = F.l1_loss(y, x) + 2 * error + 0.5 * edge + 1e-4 * z.float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update(net, step)
        if step % 20 == 0:
            psnr = -10 * math.log10(error.item() / 4 + 1e-12)
            bar.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{psnr:.1f}")
            log(work, "vae", step=step, loss=loss.item(), psnr=psnr)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_state(
                state_file,
                net=net.state_dict(),
                optimizer=optimizer.state_dict(),
                average=average.weights,
                step=step + 1,
            )


def normalise(net: torch.nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold the latents' statistics into the 1x1 convolutions: mean 0, variance 1 a channel."""
    last, first = net.quant_conv, net.post_quant_conv
    with torch.no_grad():
        first.bias += (first.weight[:, :, 0, 0] * mean).sum(1)
        first.weight *= std[None, :, None, None]
        last.weight[:4] /= std[:, None, None, None]
        last.bias[:4] = (last.bias[:4] - mean) / std
        last.bias[4:] -= 2 * std.log()  # the second half is the log variance


@main.command()
@click.option("--small", default=5000, show_default=True, help="scenes at 256 px, to begin with")
@click.option("--medium", default=3500, show_default=True, help="scenes at 512 px")
@click.option("--large", default=300, show_default=True, help="scenes at each larger size")
@click.pass_obj
def latents(work: Path, small: int, medium: int, large: int) -> None:
    """Paint scenes and encode them once; the autoencoder is normalised on the way.

    Sizes that lie encoded in this number are kept: after a new autoencoder, remove them first.
    """
    net = build_vae()
    net.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["average"])
    net = net.to(DEVICE, memory_format=torch.channels_last).eval()
    rng = random.Random(2)

    @torch.inference_mode()
    def encode(scenes: list[Scene], width: int, height: int, name: str) -> torch.Tensor:
        rows = []
        for scene in tqdm(scenes, desc=name):
            x = to_tensor(draw(scene, width, height))[None].to(DEVICE)
            rows.append(net.encode(x).latent_dist.mean.cpu())
        return torch.cat(rows)

    z = encode([sample_scene(rng) for _ in range(200)], 512, 512, "statistics")
    mean, std = z.mean((0, 2, 3)).to(DEVICE), z.std((0, 2, 3)).to(DEVICE)
    normalise(net, mean, std)
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


class Scenes:
    """Encoded scenes of one size; captions are written anew each time one is drawn."""

    def __init__(self, path: Path, seed: int) -> None:
        data = torch.load(path, weights_only=True)
        self.latents, self.size = data["latents"], data["size"]
        self.scenes = [Scene(**s) for s in data["scenes"]]
        self.rng = random.Random(seed)

    def batch(self, count: int, windows: int) -> tuple[torch.Tensor, list[str]]:
        """Latents (count, 4, h/8, w/8) and their captions."""
        picked = [self.rng.randrange(len(self.scenes)) for _ in range(count)]
        captions = [caption(self.scenes[i], self.rng, windows) for i in picked]
        return self.latents[picked].float(), captions


class Conditioner(torch.nn.Module):
    """Both text encoders; embeddings of tokens outside the vocabulary stay zero."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = build_text_encoders()
        self.tokenizer = load_tokenizer()
        known = {i for p in vocabulary() for i in self.tokenizer(p).input_ids}
        mask = torch.zeros(49408, 1)
        mask[sorted(known)] = 1
        for encoder in (self.one, self.two):
            table = encoder.get_input_embeddings().weight
            torch.nn.init.normal_(table, std=0.5)
            with torch.no_grad():
                table *= mask
            table.register_hook(lambda grad: grad * mask.to(grad.device))

    def windows(self, texts: list[str], count: int) -> torch.Tensor:
        """Token ids (batch, count, 77), cut or filled up with empty windows."""
        rows = []
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            chunks = [ids[75 * k : 75 * (k + 1)] for k in range(count)]
            rows.append([[EOS - 1, *c, *[EOS] * (76 - len(c))] for c in chunks])
        return torch.tensor(rows)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, windows, 77) -> context (batch, 77 * windows, 64), pooled (batch, 64)."""
        batch, count, _ = ids.shape
        one = self.one(ids.flatten(0, 1), output_hidden_states=True)
        two_ids = torch.where((ids == EOS) & (ids.roll(1, 2) == EOS), 0, ids)  # padded with "!"
        two = self.two(two_ids.flatten(0, 1), output_hidden_states=True)
        context = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
        return context.view(batch, count * 77, -1), two.text_embeds.view(batch, count, -1)[:, 0]


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


LARGE = ((768, 512), (512, 768), (768, 768), (896, 1152), (1024, 1024))
NAMES = tuple(f"{w}x{h}" for w, h in LARGE)
STAGES = [  # share of the steps, sizes drawn from, batch
    (0.40, ("256",), 16),
    (0.32, ("512",), 12),
    (0.28, ("512", *NAMES, *NAMES[-2:]), 6),
]


def stage_at(progress: float) -> tuple[tuple[str, ...], int]:
    for share, sizes, batch in STAGES:
        if progress < share:
            return sizes, batch
        progress -= share
    return STAGES[-1][1:]


def loss_weight(alphas: torch.Tensor, t: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """Weight of the eps loss: min-SNR (Hang et al. 2023), more where noise outweighs picture.

    There the prompt alone decides, and an eps error of e is a picture error of e / sqrt(SNR).
    """
    snr = alphas[t] / (1 - alphas[t])
    return torch.where(snr < 1, snr.rsqrt(), snr.clamp(max=gamma) / snr)


ATTRIBUTES = {name: tuple(kinds) for name, kinds in PHRASES.items()}


def text_loss(nets: torch.nn.ModuleDict, rng: random.Random, batch: int) -> torch.Tensor:
    """Cross entropy of naming a scene from its caption: by tokens of either, and pooled."""
    scenes = [sample_scene(rng) for _ in range(batch)]
    ids = nets["text"].windows([caption(s, rng) for s in scenes], 1).to(DEVICE)
    context, pooled = nets["text"](ids)
    one, two = context.mean(1).chunk(2, -1)
    loss = torch.zeros((), device=DEVICE)
    for part, features in (("one", one), ("two", two), ("pooled", pooled)):
        answers = nets[part](features).split([len(kinds) for kinds in ATTRIBUTES.values()], -1)
        for (name, kinds), logits in zip(ATTRIBUTES.items(), answers, strict=True):
            right = torch.tensor([kinds.index(getattr(s, name)) for s in scenes], device=DEVICE)
            loss = loss + F.cross_entropy(logits, right)
    return loss / (3 * len(ATTRIBUTES))


@main.command()
@click.option("--steps", default=3000, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.pass_obj
def text(work: Path, steps: int, batch: int) -> None:
    """Train the text encoders to name what a caption says, before there is a UNet to ask them.

    From noise alone the UNet learns to look at its input first and at words late, some of them
    never; encoders that already tell sunset from dawn give it a reason to.
    """
    torch.manual_seed(4)
    rng = random.Random(4)
    nets = torch.nn.ModuleDict({"text": Conditioner()})
    answers = sum(len(kinds) for kinds in ATTRIBUTES.values())
    for part, width in (("one", TEXT_WIDTH), ("two", TEXT_WIDTH), ("pooled", POOLED_WIDTH)):
        nets[part] = torch.nn.Linear(width, answers)
    nets.to(DEVICE)
    optimizer = torch.optim.AdamW(nets.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    bar = tqdm(range(steps), desc="text", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, 2e-3)
        loss = text_loss(nets, rng, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
            log(work, "text", step=step, loss=loss.item())
    save_state(work / "text.pt", net=nets["text"].state_dict())


@main.command()
@click.option("--steps", default=7000, show_default=True)
@click.option("--save-every", default=500, show_default=True)
@click.option("--rate", default=1e-3, show_default=True, help="peak learning rate")
@click.pass_obj
def unet(work: Path, steps: int, save_every: int, rate: float) -> None:
    """Train the UNet on the encoded scenes, eps prediction; the text encoders learn on slowly."""
    torch.manual_seed(3)
    nets = torch.nn.ModuleDict({"unet": build_unet(), "text": Conditioner()}).to(DEVICE)
    nets["unet"].to(memory_format=torch.channels_last)
    nets["text"].load_state_dict(torch.load(work / "text.pt", weights_only=True)["net"])
    average = Average(nets, 0.998)
    groups = [{"params": nets[part].parameters()} for part in ("unet", "text")]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    alphas = build_scheduler().alphas_cumprod.to(DEVICE)
    start = 0
    state_file = work / "unet.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        nets.load_state_dict(state["nets"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights, start = state["average"], state["step"]
        torch.manual_seed(3 + start)
    rng = random.Random(start)
    data: dict[str, Scenes] = {}
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="unet", mininterval=5)
    smooth = None
    for step in bar:
        sizes, batch = stage_at(step / steps)
        size = rng.choice(sizes)
        if size not in data:
            data[size] = Scenes(work / f"latents-{size}.pt", seed=start)
        windows = rng.choices((1, 2, 3), (0.8, 0.12, 0.08))[0]
        z, texts = data[size].batch(batch, windows)
        texts, keep = drop(texts, rng)
        width, height = data[size].size
        z, keep = z.to(DEVICE), keep.to(DEVICE)
        noise = low_noise(torch.randn_like(z))
        t = torch.randint(0, 1000, (batch,), device=DEVICE)
        a = alphas[t].view(-1, 1, 1, 1)
        x = (a.sqrt() * z + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        ids = nets["text"].windows(texts, windows).to(DEVICE)
        time_ids = torch.tensor([[height, width, 0, 0, height, width]] * batch, device=DEVICE)
        for group, share in zip(optimizer.param_groups, (1.0, 0.2), strict=True):
            group["lr"] = share * cosine(step, steps, rate, warmup=300)
        with torch.autocast(DEVICE, torch.bfloat16):
            context, pooled = nets["text"](ids)
            added = {"text_embeds": pooled * keep, "time_ids": time_ids.float()}
            eps = nets["unet"](x, t, context * keep[:, :, None], added_cond_kwargs=added).sample
        error = (eps.float() - noise).square().mean((1, 2, 3))
        loss = (error * loss_weight(alphas, t)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        average.update(nets, step)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{smooth:.4f}", size=size)
            log(work, "unet", step=step, loss=smooth, batch=batch)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_state(
                state_file,
                nets=nets.state_dict(),
                optimizer=optimizer.state_dict(),
                average=average.weights,
                step=step + 1,
            )


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=CHECKPOINT, show_default=True)
@click.pass_obj
def export(work: Path, out: Path) -> None:
    """Write the averaged weights as a diffusers folder in half precision."""
    weights = torch.load(work / "unet.pt", weights_only=True)["average"]
    nets = torch.nn.ModuleDict({"unet": build_unet(), "text": Conditioner()})
    nets.load_state_dict(weights)
    autoencoder = build_vae()
    autoencoder.load_state_dict(torch.load(work / "vae-normalised.pt", weights_only=True)["net"])
    autoencoder.register_to_config(scaling_factor=1.0)
    parts = {
        "unet": nets["unet"],
        "vae": autoencoder,
        "text_encoder": nets["text"].one,
        "text_encoder_2": nets["text"].two,
    }
    for name, net in parts.items():
        net.half().save_pretrained(out / name, safe_serialization=True)
    build_scheduler().save_pretrained(out / "scheduler")
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
