"""VAE decode: latents to pixels. A broken image (NaN, one flat colour) is an error, no result."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from imaged.engine.nets.vae import VAE
from imaged.engine.run import Run
from imaged.errors import JobFailed

#: Of a broken image, in the order of the checks in `decode`.
REASONS = (
    *("latents: not a number", "flat latents"),
    *("pixels: not a number", "one flat colour"),
)


@dataclass(frozen=True)
class Picture:
    """One finished picture: `rgb` holds height * width * 3 bytes, row by row."""

    rgb: bytes
    width: int
    height: int
    seed: int


class StepExecutor(Executor):
    """Runs submitted work in the caller's thread, one item at each `step()`.

    For the CPU: a second thread that calls torch has an OpenMP team of its own. With more threads
    than cores each operation begins by waking one, and a small UNet's calls took more than twice as
    long (decision 17).
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append((future, lambda: fn(*args, **kwargs)))
        return future

    def step(self) -> None:
        """Run the next item that was not cancelled, if any."""
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


def decoder(device: torch.device) -> StepExecutor | ThreadPoolExecutor:
    """The executor of decodes: a thread on a GPU, the loop itself on the CPU."""
    return StepExecutor() if device.type == "cpu" else ThreadPoolExecutor(1, "decoder")


class Decoding:
    """The decodes under way in an executor. One may have to be awaited: it had too little memory
    beside UNet calls, or they beside it.
    """

    def __init__(self, executor: StepExecutor | ThreadPoolExecutor) -> None:
        self._executor = executor
        self._under_way: list[tuple[Run, Future[Picture]]] = []
        self._awaited: Future[Picture] | None = None

    @property
    def awaited(self) -> bool:
        """Whether no UNet call may be made until a decode has ended."""
        return self._awaited is not None and not self._awaited.done()

    def add(self, run: Run, vae: VAE) -> None:
        """Decode a finished image, by and by."""
        self._under_way.append((run, self._executor.submit(finished, vae, run)))

    def await_last(self) -> bool:
        """Have the decode that was added last awaited; False if none is under way."""
        if self._under_way:
            self._awaited = self._under_way[-1][1]
        return bool(self._under_way)

    def drop(self, job_id: str) -> None:
        """Forget a job's decodes, but one that runs."""
        self._under_way = [
            (run, future)
            for run, future in self._under_way
            if run.job_id != job_id or not future.cancel()
        ]

    def ended(self, wait_s: float) -> list[tuple[Run, Future[Picture]]]:
        """The decodes that have ended, with a picture or an error, after a wait of at most `wait_s`
        seconds for the first; in the caller's thread, one is made.
        """
        if isinstance(self._executor, StepExecutor):
            self._executor.step()
        if wait_s and self._under_way:
            wait([future for _, future in self._under_way], wait_s, "FIRST_COMPLETED")
        before, self._under_way, ended = self._under_way, [], list[tuple[Run, Future[Picture]]]()
        for run, future in before:
            if not future.done():
                self._under_way.append((run, future))
            elif not future.cancelled():
                ended.append((run, future))
        return ended

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


def finished(vae: VAE, run: Run) -> Picture:
    """Decode the final latent, or of a draft the estimate of it."""
    return decode(vae, run.result, run.plan.seed)


@torch.inference_mode()
def decode(vae: VAE, latent: torch.Tensor, seed: int) -> Picture:
    """(C, h, w) latent -> picture; raises JobFailed("nan_output") rather than give a broken one.

    All checks are read back together: one wait for the device.
    """
    pixels = vae(unscale(vae, latent)[None].to(vae.dtype))[0].float()
    image, ends = _levels(pixels).to(torch.uint8), _ends(pixels)
    flags = (
        _finite(*_ends(latent)),
        _varied(*_ends(latent)),
        _finite(*ends),
        _varied(*map(_levels, ends)),
    )
    for good, reason in zip(torch.stack(flags).tolist(), REASONS, strict=True):
        if not good:
            raise JobFailed("nan_output", f"the model's output was not a picture ({reason})")
    _, height, width = image.shape
    return Picture(image.permute(1, 2, 0).cpu().numpy().tobytes(), width, height, seed)


def _levels(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> whole numbers in [0, 255]."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round()


def _ends(planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(C, h, w) -> (C,) minimum and (C,) maximum of each plane; NaN where a plane has one."""
    low, high = torch.aminmax(planes.flatten(1), dim=1)
    return low, high


def _finite(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return (low.isfinite() & high.isfinite()).all()


def _varied(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Whether any plane has more than one value."""
    return (low != high).any()


def unscale(vae: VAE, latent: torch.Tensor) -> torch.Tensor:
    """(C, h, w) latent in the UNet's scale -> in the VAE's."""
    scale, mean, std = vae.config.scaling_factor, vae.config.latents_mean, vae.config.latents_std
    if mean is None or std is None:
        return latent / scale
    shape = (-1, 1, 1)
    return latent * _column(std, latent).view(shape) / scale + _column(mean, latent).view(shape)


def _column(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)
