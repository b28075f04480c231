"""What the parts share: their options, learning rate, averaged weights, resumable state, log."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import torch
from tqdm import tqdm

mpl.use("Agg")  # files only: no window is opened
import matplotlib.pyplot as plt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Options:
    """What all parts are told."""

    work: Path
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE, self.dtype, enabled=self.dtype != torch.float32)


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


def earlier(work: Path, name: str, part: str) -> Any:
    """What an earlier part wrote."""
    if not (work / name).exists():
        raise click.ClickException(f"{work / name} is not there: run the part `{part}` first")
    return torch.load(work / name, map_location="cpu", weights_only=True)


class Run:
    """One part's training: nets, optimizer, their moving average, and where they are kept.

    `average` is what is shipped: an exponential moving average of the weights.
    """

    def __init__(
        self, work: Path, part: str, nets: torch.nn.Module, groups: Any, steps: int, decay: float
    ) -> None:
        self.work, self.part, self.nets, self.steps, self.decay = work, part, nets, steps, decay
        self.optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.average = {k: v.detach().clone() for k, v in nets.state_dict().items()}
        self.start, self.smooth = 0, math.nan
        if self.file.exists():
            state = torch.load(self.file, map_location=DEVICE, weights_only=True)
            nets.load_state_dict(state["nets"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.start = state["average"], state["step"]
        self._forget_from(self.start)

    @property
    def file(self) -> Path:
        return self.work / f"{self.part}.pt"

    @property
    def log(self) -> Path:
        return self.file.with_suffix(".jsonl")

    def _forget_from(self, step: int) -> None:
        """Drop the log's rows of steps that will be made again."""
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        self.log.write_text("".join(line for line in lines if json.loads(line)["step"] < step))

    def __iter__(self) -> Iterator[int]:
        """The steps that are left, behind a progress bar; the last one saves."""
        steps = range(self.start, self.steps)
        self.bar = tqdm(steps, initial=self.start, total=self.steps, desc=self.part, mininterval=2)
        yield from self.bar

    def update(self, step: int, loss: torch.Tensor, rates: tuple[float, ...], **row: Any) -> None:
        """One optimizer step at the given learning rate of each parameter group."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.nets.parameters(), 1.0)
        self.optimizer.step()
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in self.nets.state_dict().items():
            if value.dtype.is_floating_point:
                self.average[name].lerp_(value.detach(), 1 - decay)
        value = loss.item()
        self.smooth = value if math.isnan(self.smooth) else 0.99 * self.smooth + 0.01 * value
        if step % 20 == 0:
            self.bar.set_postfix(loss=f"{self.smooth:.4f}", **row)
            with self.log.open("a") as f:
                f.write(json.dumps({"step": step, "loss": self.smooth, **row}) + "\n")

    def due(self, step: int, every: int) -> bool:
        return (step + 1) % every == 0 or step + 1 == self.steps

    def save(self, step: int) -> None:
        """Keep the state and draw the loss so far."""
        save_state(
            self.file,
            nets=self.nets.state_dict(),
            optimizer=self.optimizer.state_dict(),
            average=self.average,
            step=step + 1,
        )
        plot(self.log)


def plot(log: Path) -> None:
    """Draw a log's loss over its steps as a PNG beside it."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], linewidth=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=log.stem)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(log.with_suffix(".png"), dpi=100)
    plt.close(figure)
