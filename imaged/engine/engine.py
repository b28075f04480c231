"""Continuous batching by step: images share UNet calls, and join and leave between two calls."""

from __future__ import annotations

import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch

from imaged.engine.cpu import cpu_name
from imaged.engine.decode import Decoding, Picture, decoder
from imaged.engine.denoise import denoise
from imaged.engine.intake import Intake
from imaged.engine.loading.load import Nets
from imaged.engine.loading.lora import NO_LORAS
from imaged.engine.net_variants import NetVariants
from imaged.engine.out_of_memory import is_full
from imaged.engine.outcome import EngineJob, Outcome, Progress, as_failure
from imaged.engine.preview import Previews
from imaged.engine.run import Run
from imaged.engine.scheduling.batching import choose
from imaged.engine.scheduling.call_budget import PIXELS_A_CALL, CallBudget
from imaged.engine.scheduling.device_time import DeviceTime
from imaged.engine.snapshot import WHOLE, Provenance, RunPlan, pack
from imaged.errors import JobFailed
from imaged.params.image_params import ImageParams

PREVIEW_CALLS = 5  # UNet calls between two previews
PATIENCE_S = 0.05  # how long a tick waits for a decoding when there is nothing to denoise


class Engine:
    """One checkpoint on one device. Not thread-safe: the worker's loop owns it.

    submit() a job, then tick() until its outcome is returned: exactly one for each job that is not
    cancelled. exact: batch-invariant, an image has the same bits whatever shares its calls, which
    are padded for that; else its last bits may differ with the batch. graphs: replay CUDA graphs
    (nets/cuda_graphs.py). loras, embeddings: folders of their files.

    jobs: those submitted, by id, until their outcome. device: see device_name.
    """

    def __init__(
        self,
        nets: Nets,
        *,
        exact: bool = True,
        previews: bool = True,
        graphs: bool = False,
        loras: Path | None = None,
        embeddings: Path | None = None,
        pixels_a_call: int = PIXELS_A_CALL,
    ) -> None:
        device, executor = nets.unet.device, decoder(nets.unet.device)
        self.nets, self.device = nets, device_name(device)
        self.variants = NetVariants(nets, loras, graphs=graphs)
        self.budget = CallBudget(pixels_a_call, exact=exact)
        self.device_time = DeviceTime[Run](device)
        self.decoding = Decoding(executor)
        self.previews = Previews(executor, nets.vae, nets.channels, on=previews)
        self._provenance = partial(Provenance.of, nets=nets, device=self.device, exact=exact)
        self._intake = Intake(nets, self.variants, embeddings, self._provenance)
        self.jobs: dict[str, EngineJob] = {}

    @property
    def idle(self) -> bool:
        return not self.jobs

    def submit(
        self, job_id: str, params: ImageParams, key_id: int = 0, resume_plan: RunPlan = WHOLE
    ) -> None:
        """Take a job in at the next tick. key_id: its API key; keys share the device fairly."""
        self.jobs[job_id] = EngineJob(job_id, params, key_id, resume_plan)

    def snapshots(self, job_id: str) -> dict[int, bytes]:
        """Snapshots of a job's images by sample index; empty for a job that has not started."""
        runs = self.jobs[job_id].runs if job_id in self.jobs else []
        return {run.sample: pack(run, self._provenance(run)) for run in runs}

    def cancel(self, job_id: str) -> None:
        """Drop a job before the next call; it has no outcome."""
        self.jobs.pop(job_id, None)
        self.decoding.drop(job_id)
        self.variants.free_float32(run for other in self.jobs.values() for run in other.runs)

    def close(self) -> None:
        """Stop decoding and take LoRAs out of the nets."""
        self.decoding.close()
        self.variants.loras.use(NO_LORAS)

    def progress(self) -> dict[str, Progress]:
        """Of the jobs that have started."""
        return {
            job_id: job.progress(self.previews.newest(job.runs[0]))
            for job_id, job in self.jobs.items()
            if job.runs
        }

    def tick(self) -> list[Outcome]:
        """At most one UNet call, and on the CPU one decoding; returns the jobs that ended.

        Raises device errors, after which the process is unusable.
        """
        outcomes = self._start_newcomers()
        chosen = self._choose(time.monotonic())
        try:
            outputs = self._denoise(chosen) if chosen else []
        except (RuntimeError, MemoryError) as error:
            return outcomes + self._out_of_memory(chosen, error)
        self._advance(chosen, outputs)
        for run, future in self.decoding.ended(wait_s=0.0 if chosen else PATIENCE_S):
            outcomes += self._take_decoded(run, future)
        return outcomes

    def _start_newcomers(self) -> list[Outcome]:
        outcomes = []
        for job in [job for job in self.jobs.values() if not job.runs]:
            job.started = time.monotonic()
            present = {run.key_id for other in self.jobs.values() for run in other.runs}
            try:
                job.runs = self._intake.start(job)
            except Exception as error:  # one job's prompt must not harm another's picture
                outcomes += self._end(job.job_id, error)
                continue
            self.device_time.join(present, job.key_id)
            for run in job.runs:
                if run.done:
                    self.decoding.add(run, self.variants.vae_of(run))
        return outcomes

    def _choose(self, now: float) -> list[Run]:
        """The images of the next call; none while a decode is awaited."""
        if self.decoding.awaited:
            return []
        self.budget.renew(now)
        running = [run for job in self.jobs.values() for run in job.runs if not run.done]
        cost, used_s = self.device_time.cost_model.cost, self.device_time.used_s
        fits = partial(self.budget.allows, self.variants.unet_of)
        return choose(running, cost, used_s, now, fits, self.budget.padded)

    def _denoise(self, chosen: list[Run]) -> list[torch.Tensor]:
        bucket = self.budget.padded(sum(run.rows for run in chosen))
        began = self.device_time.clock.mark()
        outputs = denoise(self.variants.unet_of(chosen[0]), chosen, bucket)
        self.device_time.add(chosen, bucket * chosen[0].pixels, began)
        return outputs

    def _out_of_memory(self, chosen: list[Run], error: RuntimeError | MemoryError) -> list[Outcome]:
        """Halve the limit of pixels in a call. A call of one image is retried once, when what is
        being decoded has ended; if that fails too, its job fails. Raises other errors.
        """
        if not is_full(error):
            raise error
        error.__traceback__ = None  # it holds what was in memory
        [first, *others] = chosen
        if others:
            self.budget.halve(sum(run.rows for run in chosen), first.pixels, time.monotonic())
            return []
        if not first.retried_alone and self.decoding.await_last():
            first.retried_alone = True
            return []
        return self._end(first.job_id, error)

    def _advance(self, chosen: list[Run], outputs: list[torch.Tensor]) -> None:
        """Take in a call's outputs; begin the decodes of finished images and, every PREVIEW_CALLS,
        a preview of a job's first image. Waits so that at most one call is queued on the device.
        """
        for run, output in zip(chosen, outputs, strict=True):
            run.advance(output)
        for run, seconds in self.device_time.ended(more=bool(chosen)):
            run.served_s += seconds
        for run in chosen:
            if run.done:
                self.decoding.add(run, self.variants.vae_of(run))
            elif run.call % PREVIEW_CALLS == 0 and run is self.jobs[run.job_id].runs[0]:
                self.previews.make(run)

    def _take_decoded(self, run: Run, future: Future[Picture]) -> list[Outcome]:
        """Keep a picture. A decode that was out of memory is repeated once with the device to
        itself; what was no picture is made again in float32.
        """
        job, error = self.jobs.get(run.job_id), future.exception()
        if job is None or run not in job.runs:  # cancelled, or another sample of it has failed
            as_failure(error, self.nets.unet.device.type)  # raises any device error
            return []
        if is_full(error) and not run.retried_alone:
            error.__traceback__ = None  # it holds what was in memory
            run.retried_alone = True
            self.decoding.add(run, self.variants.vae_of(run))
            self.decoding.await_last()
            return []
        if isinstance(error, JobFailed) and error.code == "nan_output":
            try:
                if self.variants.restart_in_float32(run):
                    return []
            except (RuntimeError, MemoryError) as full:
                error = full
        if error is not None:
            return self._end(run.job_id, error)
        return self._end(run.job_id) if job.take(run, future.result()) else []

    def _end(self, job_id: str, error: BaseException | None = None) -> list[Outcome]:
        """Remove the job and make its outcome."""
        job = self.jobs.pop(job_id)
        self.variants.free_float32(run for other in self.jobs.values() for run in other.runs)
        failure = as_failure(error, self.nets.unet.device.type)
        seconds = time.monotonic() - job.started
        if failure:
            return [Outcome(job_id, (), failure, seconds)]
        return [job.completed(self._provenance(job.runs[0]), seconds)]


def device_name(device: torch.device) -> str:
    """Hardware and torch build, as far as they affect bitwise reproducibility."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{cpu_name()}, torch {torch.__version__}"
