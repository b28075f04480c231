"""The loop: pictures of any jobs share UNet calls, and join and leave between calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from imaged.engine.batching import PIXELS_A_CALL, choose
from imaged.engine.decode import Picture, decode
from imaged.engine.denoise import Ask, denoise
from imaged.engine.load import Nets
from imaged.engine.plan import Plan, plan_images
from imaged.engine.prompt.encode import Encoded, PromptEncoder
from imaged.errors import ImagedError, JobFailed
from imaged.params import ImageParams

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a job ended: all its pictures, or why there are none."""

    job_id: str
    pictures: tuple[Picture, ...]
    error: ImagedError | None
    inference_s: float


@dataclass
class Run:
    """One picture under way. Its whole state between two calls is (seed, call, history)."""

    job_id: str
    plan: Plan
    positive: Encoded
    negative: Encoded
    served_at: int
    call: int = 0
    history: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # (K, C, h, w)
    drawn: int = 0
    generator: torch.Generator = field(default_factory=lambda: torch.Generator("cpu"))

    def start(self, device: torch.device) -> None:
        table = self.plan.table
        self.generator.manual_seed(self.plan.seed)
        self.history = torch.zeros(table.rows.shape[1], *self.plan.latent_shape, device=device)
        self.history[0] = self._noise()

    def _noise(self) -> torch.Tensor:
        """Drawn on the CPU in the order of the reference: latents first, then call by call."""
        return torch.randn(1, *self.plan.latent_shape, generator=self.generator)[0]

    @property
    def shape(self) -> Hashable:
        return (self.plan.latent_shape, self.positive.context.shape[0])

    @property
    def rows(self) -> int:
        return 2 if self.plan.guided else 1

    @property
    def pixels(self) -> int:
        return self.plan.width * self.plan.height

    @property
    def done(self) -> bool:
        return self.call == self.plan.table.calls

    def combine(self) -> torch.Tensor:
        """The table's next row over the history: the UNet's input, or at the end the latent."""
        row = self.plan.table.rows[self.call].to(self.history.device)
        combined: torch.Tensor = torch.tensordot(row, self.history, dims=1)
        return combined

    def ask(self) -> Ask:
        """What the UNet is asked next."""
        timestep = float(self.plan.table.timesteps[self.call])
        return Ask(self.combine(), timestep, self.plan, self.positive, self.negative)

    def advance(self, output: torch.Tensor) -> None:
        """Take in one model output, and draw what the sampler draws after this call."""
        table = self.plan.table
        self.history[1 + self.call] = output
        for _ in range(table.draws[self.call]):
            self.history[1 + table.calls + self.drawn] = self._noise()
            self.drawn += 1
        self.call += 1


@dataclass
class _Job:
    started: float
    runs: list[Run]
    pictures: dict[int, Picture] = field(default_factory=dict)


class Engine:
    """One checkpoint on one device. Not for several threads: the worker's loop owns it.

    submit() a job, tick() until it comes out. Exactly one outcome for each job that is not
    cancelled.
    """

    def __init__(self, nets: Nets, *, pixels_a_call: int = PIXELS_A_CALL) -> None:
        self.nets = nets
        self._pixels_a_call = pixels_a_call
        self._encoder = PromptEncoder(nets)
        self._jobs: dict[str, _Job] = {}
        self._newcomers: list[tuple[str, ImageParams]] = []
        self._clock = 0

    @property
    def idle(self) -> bool:
        return not self._jobs and not self._newcomers

    @property
    def jobs(self) -> frozenset[str]:
        return frozenset(self._jobs) | {job_id for job_id, _ in self._newcomers}

    def submit(self, job_id: str, params: ImageParams) -> None:
        self._newcomers.append((job_id, params))

    def cancel(self, job_id: str) -> None:
        """The job leaves between two calls and has no outcome."""
        self._jobs.pop(job_id, None)
        self._newcomers = [n for n in self._newcomers if n[0] != job_id]

    def progress(self) -> dict[str, tuple[int, int]]:
        """UNet calls made and to make, over all pictures of each job."""
        return {
            job_id: (sum(r.call for r in job.runs), sum(r.plan.table.calls for r in job.runs))
            for job_id, job in self._jobs.items()
        }

    def tick(self) -> list[Outcome]:
        """At most one UNet call; returns the jobs that ended."""
        outcomes = self._start_newcomers()
        chosen = choose(self._running(), self._pixels_a_call)
        try:
            outputs = denoise(self.nets.unet, [r.ask() for r in chosen]) if chosen else []
        except torch.OutOfMemoryError as error:
            return outcomes + self._shed(chosen, error)
        for run, output in zip(chosen, outputs, strict=True):
            run.advance(output)
            run.served_at = self._next()
        for run in [r for r in chosen if r.done]:
            outcomes += self._finish(run)
        return outcomes

    def _shed(self, chosen: list[Run], error: torch.OutOfMemoryError) -> list[Outcome]:
        """A call was too large: smaller ones from now on; if it held one picture, its job fails."""
        if len(chosen) > 1:
            self._pixels_a_call = sum(r.rows * r.pixels for r in chosen) // 2
            return []
        job = self._jobs.pop(chosen[0].job_id)
        return [Outcome(chosen[0].job_id, (), _as_failure(error), time.monotonic() - job.started)]

    def _next(self) -> int:
        self._clock += 1
        return self._clock

    def _running(self) -> list[Run]:
        return [r for job in self._jobs.values() for r in job.runs if not r.done]

    def _start_newcomers(self) -> list[Outcome]:
        outcomes = []
        for job_id, params in self._newcomers:
            try:
                self._jobs[job_id] = self._start(job_id, params)
            except Exception as error:  # one job's prompt must not harm another's picture
                outcomes.append(Outcome(job_id, (), _as_failure(error), 0.0))
        self._newcomers = []
        return outcomes

    def _start(self, job_id: str, params: ImageParams) -> _Job:
        nets = self.nets
        plans = plan_images(params, nets.scheduler_config, nets.channels, nets.factor)
        positive, negative = self._encoder.pair(params.prompt, params.negative_prompt)
        runs = [Run(job_id, plan, positive, negative, self._next()) for plan in plans]
        for run in runs:
            run.start(nets.device)
        return _Job(time.monotonic(), runs)

    def _finish(self, run: Run) -> list[Outcome]:
        """Decode one finished picture; the job's outcome with its last one."""
        job = self._jobs.get(run.job_id)
        if job is None:
            return []  # another sample of the job failed in this tick
        error: ImagedError | None = None
        try:
            job.pictures[run.plan.seed] = decode(self.nets.vae, run.combine(), run.plan.seed)
        except Exception as failure:
            error = _as_failure(failure)
        if error is None and len(job.pictures) < len(job.runs):
            return []
        del self._jobs[run.job_id]
        pictures = () if error else tuple(p for _, p in sorted(job.pictures.items()))
        return [Outcome(run.job_id, pictures, error, time.monotonic() - job.started)]


def _as_failure(error: Exception) -> ImagedError:
    """An error of one job; a device error other than out of memory is not ours to survive."""
    if isinstance(error, ImagedError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return JobFailed("out_of_memory", "the device ran out of memory for this picture")
    if isinstance(error, torch.AcceleratorError):
        raise error
    log.error("a picture could not be made", exc_info=error)
    return JobFailed("engine_error", "the picture could not be made; the server's log says why")
