"""Latents to pixels, and the guard that no broken picture passes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from imaged.engine.nets.vae import VAE
from imaged.errors import JobFailed


@dataclass(frozen=True)
class Picture:
    """One finished picture: `rgb` holds height * width * 3 bytes, row by row."""

    rgb: bytes
    width: int
    height: int
    seed: int


class InTurn(Executor):
    """Does what it is given in the thread that asks for it, one thing at each `step()`.

    For the CPU: a second thread that calls torch brings threads of its own for its arithmetic, more
    than there are cores, and then each operation of either begins with waking a thread; the calls
    of a small UNet took more than twice as long (decision 17).
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append((future, lambda: fn(*args, **kwargs)))
        return future

    def step(self) -> None:
        """Do the next thing that was not cancelled, if there is one."""
        while self._waiting:
            future, work = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)
                return

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._waiting.clear()


def decoder(device: torch.device) -> InTurn | ThreadPoolExecutor:
    """Where pictures are decoded: beside the loop on a GPU, in turn with UNet calls on the CPU."""
    return InTurn() if device.type == "cpu" else ThreadPoolExecutor(1, "decoder")


@torch.inference_mode()
def decode(vae: VAE, latent: torch.Tensor, seed: int) -> Picture:
    """(C, h, w) latent -> picture; raises JobFailed("nan_output") rather than give a broken one."""
    if not bool(torch.isfinite(latent).all()):
        raise JobFailed("nan_output", "the model's output was not a picture (not a number)")
    if _flat(latent):
        raise JobFailed("nan_output", "the model's output was not a picture (flat latents)")
    z = unscale(vae, latent)
    pixels = vae(z[None].to(vae.dtype))[0].float()
    if not bool(torch.isfinite(pixels).all()):
        raise JobFailed("nan_output", "the model's output was not a picture (not a number)")
    image = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if _flat(image):
        raise JobFailed("nan_output", "the model's output was not a picture (one flat colour)")
    _, height, width = image.shape
    return Picture(image.permute(1, 2, 0).cpu().numpy().tobytes(), width, height, seed)


def _flat(planes: torch.Tensor) -> bool:
    """(C, h, w): whether each plane has one value only, which may differ from plane to plane."""
    return bool((planes.amax((1, 2)) == planes.amin((1, 2))).all())


def unscale(vae: VAE, latent: torch.Tensor) -> torch.Tensor:
    """(C, h, w) as the UNet has it -> as the VAE has it."""
    scale, mean, std = vae.config.scaling_factor, vae.config.latents_mean, vae.config.latents_std
    if mean is None or std is None:
        return latent / scale
    shape = (-1, 1, 1)
    return latent * _column(std, latent).view(shape) / scale + _column(mean, latent).view(shape)


def _column(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)
