"""Continuous batching by step: images share UNet calls, and join and leave between two calls."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from imaged.engine.cpu import cpu_name
from imaged.engine.decode import Picture, StepExecutor, decode, decoder
from imaged.engine.denoise import denoise
from imaged.engine.float32_retry import in_float32
from imaged.engine.loading.load import Nets
from imaged.engine.loading.lora import NO_LORAS, Loras
from imaged.engine.nets.cached_unet import Unet
from imaged.engine.nets.layers import GUIDED_ROWS
from imaged.engine.out_of_memory import is_full
from imaged.engine.outcome import Outcome, Progress, as_failure
from imaged.engine.plan import plan_images
from imaged.engine.preview import LatentToRgb, Preview
from imaged.engine.prompt.encode import PromptEncoder
from imaged.engine.run import Run
from imaged.engine.scheduling.batching import MAX_PICTURES, choose, joined
from imaged.engine.scheduling.cost_model import Clock, CostModel
from imaged.engine.scheduling.row_buckets import VerifiedBatchSizes, fit
from imaged.engine.snapshot import WHOLE, Provenance, RunPlan, pack, read, resume
from imaged.errors import JobFailed
from imaged.params.image_params import ImageParams
from imaged.params.loras import without_loras
from imaged.sampling.schedulers import calls_before

log = logging.getLogger(__name__)

PIXELS_A_CALL = 2 * 4 * 1024 * 1024  # rows times pixels: four guided pictures of 1024 x 1024
PREVIEW_CALLS = 5  # UNet calls between two previews
GROW_S = 60.0  # after out of memory, until the limit of pixels is doubled again
PATIENCE_S = 0.05  # how long a tick waits for a decoding when there is nothing to denoise


@dataclass
class _Job:
    started: float
    runs: list[Run]
    draft: bool = False
    pictures: dict[int, Picture] = field(default_factory=dict)
    preview: Preview | None = None


class Engine:
    """One checkpoint on one device. Not thread-safe: the worker's loop owns it.

    submit() a job, then tick() until its outcome is returned: exactly one for each job that is not
    cancelled. exact: batch-invariant, an image has the same bits whatever shares its calls, which
    are padded for that; else its last bits may differ with the batch. graphs: replay CUDA graphs
    (nets/cuda_graphs.py). loras, embeddings: folders of their files.
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
        self.nets, self.exact, self.previews = nets, exact, previews
        self._pixels_a_call = self._most_pixels = pixels_a_call
        self._grow_at = math.inf
        self._encoder = PromptEncoder(nets, embeddings)
        self.unet = Unet(nets.unet, graphs=graphs)
        texts = {part: getattr(nets, part) for part in ("text_encoder", "text_encoder_2")}
        self._folder, self._loras = loras, Loras({"unet": nets.unet, **texts}, loras)
        self._float32: tuple[Unet, Any, Loras] | None = None  # UNet and VAE in float32
        self._batch_sizes, self._cost_model = VerifiedBatchSizes(), CostModel()
        self._clock = Clock(self.unet.device)
        #: Calls queued on the device: images, rows of each, start and end marks.
        self._under_way: deque[tuple[list[Run], list[int], Any, Any]] = deque()
        self._jobs: dict[str, _Job] = {}
        self._newcomers: list[tuple[str, ImageParams, int, RunPlan]] = []
        self._used_s: dict[int, float] = {}  # seconds of the device by key
        self._decoder = decoder(self.unet.device)
        self._decoding: list[tuple[Run, Future[Picture]]] = []
        self._awaited_decode: Future[Picture] | None = None  # no call until it ends
        self._rgb = self._decoder.submit(LatentToRgb, nets.vae, nets.channels) if previews else None
        self._step()

    @property
    def idle(self) -> bool:
        return not self._jobs and not self._newcomers

    @property
    def jobs(self) -> frozenset[str]:
        return frozenset(self._jobs) | {job_id for job_id, *_ in self._newcomers}

    @property
    def device(self) -> str:
        """Hardware and torch build, as far as they affect bitwise reproducibility."""
        if self.unet.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.unet.device)}, torch {torch.__version__}"
        return f"{cpu_name()}, torch {torch.__version__}"

    def submit(
        self, job_id: str, params: ImageParams, key_id: int = 0, resume_plan: RunPlan = WHOLE
    ) -> None:
        """Take a job in at the next tick. key_id: its API key; keys share the device fairly."""
        self._newcomers.append((job_id, params, key_id, resume_plan))

    def snapshots(self, job_id: str) -> dict[int, bytes]:
        """Snapshots of a job's images by sample index; empty for a job that has not started."""
        runs = self._jobs[job_id].runs if job_id in self._jobs else []
        return {run.sample: pack(run, self._provenance(run)) for run in runs}

    def _provenance(self, run: Run) -> Provenance:
        return Provenance.of(run, self.nets, self.device, exact=self.exact)

    def cancel(self, job_id: str) -> None:
        """Drop a job before the next call; it has no outcome."""
        self._jobs.pop(job_id, None)
        self._newcomers = [n for n in self._newcomers if n[0] != job_id]
        self._decoding = [
            (r, future) for r, future in self._decoding if r.job_id != job_id or not future.cancel()
        ]

    def close(self) -> None:
        """Stop decoding and take LoRAs out of the nets."""
        self._decoder.shutdown(cancel_futures=True)
        self._loras.use(NO_LORAS)

    def progress(self) -> dict[str, Progress]:
        return {
            job_id: Progress(
                sum(r.call for r in job.runs), sum(r.calls_to_make for r in job.runs), job.preview
            )
            for job_id, job in self._jobs.items()
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
        for run, output in zip(chosen, outputs, strict=True):
            run.advance(output)
        self._account(ahead=self._clock.ahead if chosen else 0)
        self._follow(chosen)
        return outcomes + self._decoded(wait_s=0.0 if chosen else PATIENCE_S)

    # -- the call -----------------------------------------------------------------------------

    def _choose(self, now: float) -> list[Run]:
        """The images of the next call; none while a decode is awaited. Doubles the limit of pixels
        after GROW_S.
        """
        self._batch_sizes.tried = False
        if self._awaited_decode and not self._awaited_decode.done():
            return []
        if now > self._grow_at:
            self._pixels_a_call = min(2 * self._pixels_a_call, self._most_pixels)
            fits_again = self._pixels_a_call == self._most_pixels
            self._grow_at = math.inf if fits_again else now + GROW_S
        running = [r for job in self._jobs.values() for r in job.runs if not r.done]
        return choose(running, self._cost_model.cost, self._used_s, now, self._fits, self._bucket)

    def _denoise(self, chosen: list[Run]) -> list[torch.Tensor]:
        bucket = self._bucket(sum(r.rows for r in chosen))
        began = self._clock.mark()
        outputs = denoise(self._unet(chosen[0]), chosen, bucket)
        rows = [run.rows for run in chosen]
        self._under_way.append((chosen, rows, began, self._clock.mark()))
        return outputs

    def _bucket(self, rows: int) -> int:
        """Batch size after padding."""
        return fit(rows) if self.exact else rows

    def _fits(self, run: Run, rows: int) -> bool:
        """Whether a batch of this image's shape may have so many rows: memory, and exactness."""
        if rows > 2 * MAX_PICTURES or self._bucket(rows) * run.pixels > self._pixels_a_call:
            return False
        if not self.exact:
            return True
        try:
            unet = self._unet(run)
        except (RuntimeError, MemoryError) as error:
            if not is_full(error):
                raise
            return False  # it goes alone, and its own call says that it does not fit
        guided = run.rows == GUIDED_ROWS and rows % GUIDED_ROWS == 0  # every image of the batch
        return self._batch_sizes.allow(unet, run.kind, rows, run.example, guided)

    def _unet(self, run: Run) -> Unet:
        """The UNet that makes this picture, with the picture's LoRAs in use and no others."""
        unet, loras = self.unet, self._loras
        if run.float32_retry:
            unet, _, loras = self._in_float32()
        loras.use(run.loras)
        unet.loras_in_use = run.loras != NO_LORAS
        return unet

    def _account(self, ahead: int) -> None:
        """Charge finished calls to their keys and feed the cost model; waits for all but the last
        `ahead`, so that no more are queued on the device.
        """
        while len(self._under_way) > ahead:
            chosen, rows, began, ended = self._under_way.popleft()
            seconds = self._clock.seconds(began, ended)
            self._cost_model.add(self._bucket(sum(rows)) * chosen[0].pixels, seconds)
            for run, own in zip(chosen, rows, strict=True):
                share = seconds * own / sum(rows)
                run.served_s += seconds
                self._used_s[run.key_id] = self._used_s.get(run.key_id, 0.0) + share

    def _out_of_memory(self, chosen: list[Run], error: RuntimeError | MemoryError) -> list[Outcome]:
        """Halve the limit of pixels in a call for GROW_S. A call of one image is retried once, when
        what is being decoded has ended; if that fails too, its job fails. Raises other errors.
        """
        if not is_full(error):
            raise error
        error.__traceback__ = None  # it holds what was in memory
        [first, *others] = chosen
        if others:
            self._pixels_a_call = self._bucket(sum(r.rows for r in chosen)) * first.pixels // 2
            self._grow_at = time.monotonic() + GROW_S
            return []
        if self._decoding and not first.retried_alone:
            first.retried_alone, self._awaited_decode = True, self._decoding[-1][1]
            return []
        return self._end(first.job_id, error)

    # -- from job to pictures under way ---------------------------------------------------------

    def _start_newcomers(self) -> list[Outcome]:
        outcomes = []
        for job_id, params, key_id, resume_plan in self._newcomers:
            started = time.monotonic()
            self._jobs[job_id] = _Job(started, [], draft=resume_plan.draft > 0)
            try:
                self._jobs[job_id].runs = self._start(job_id, params, key_id, resume_plan)
            except Exception as error:  # one job's prompt must not harm another's picture
                outcomes += self._end(job_id, error)
        self._newcomers = []
        return outcomes

    def _start(
        self, job_id: str, params: ImageParams, key_id: int, resume_plan: RunPlan
    ) -> list[Run]:
        nets = self.nets
        plans = plan_images(params, nets.scheduler_config, nets.channels, nets.vae_scale_factor)
        loras = self._loras.find(params.all_loras)
        self._loras.use(loras)
        negated = params.negative_prompt and without_loras(params.negative_prompt)
        prompts, steps = (without_loras(params.prompt), negated), params.num_inference_steps
        positive, negative = self._encoder.by_step(*prompts, steps, params.reading, loras)
        texts = (negative, positive) if plans[0].guided else (positive,)
        now = time.monotonic()
        present = {r.key_id for job in self._jobs.values() for r in job.runs}
        self._used_s = joined(self._used_s, present, key_id)
        park_at = calls_before(params.scheduler, resume_plan.draft) if resume_plan.draft else None
        shared: dict[int, torch.Tensor] = {}
        runs = []
        for k in resume_plan.samples or range(len(plans)):
            run = Run(job_id, plans[k], texts, loras, key_id, now, sample=k, park_at=park_at)
            run.varied = resume_plan.varied
            saved = read(run, resume_plan, self._provenance(run))
            run.float32_retry = saved is not None and saved.float32_retry
            run.start(self._unet(run), {} if run.float32_retry else shared)
            if saved is not None:
                resume(run, saved)
            if run.done:
                self._decode(run)
            runs.append(run)
        return runs

    # -- from latents to pictures ---------------------------------------------------------------

    def _follow(self, chosen: list[Run]) -> None:
        """After a call: a job's preview every PREVIEW_CALLS, and the decode of a finished image."""
        for run in chosen:
            job = self._jobs[run.job_id]
            if run.done:
                self._decode(run)
            elif self.previews and run is job.runs[0] and run.call % PREVIEW_CALLS == 0:
                self._preview(job, run)

    def _decode(self, run: Run) -> Future[Picture]:
        vae = self._in_float32()[1] if run.float32_retry else self.nets.vae
        future = self._decoder.submit(_finished, vae, run)
        self._decoding.append((run, future))
        return future

    def _preview(self, job: _Job, run: Run) -> None:
        """Make a preview once the map to RGB is fitted; on a GPU in the decoder's thread."""
        if not self._rgb or not self._rgb.done():
            return
        with self._previews_off_if_full():
            make = partial(self._rgb.result(), run.result, run.call)
            if isinstance(self._decoder, StepExecutor):
                job.preview = make()
            else:
                self._decoder.submit(self._show, job, make)

    def _show(self, job: _Job, make: Callable[[], Preview]) -> None:
        with self._previews_off_if_full():
            job.preview = make()

    @contextmanager
    def _previews_off_if_full(self) -> Iterator[None]:
        """Out of memory turns previews off: images need it more."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_full(error):
                raise
            self.previews = False

    def _step(self) -> None:
        if isinstance(self._decoder, StepExecutor):
            self._decoder.step()

    def _decoded(self, wait_s: float) -> list[Outcome]:
        """Outcomes of the jobs whose last image has been decoded."""
        self._step()
        if wait_s and self._decoding:
            wait([future for _, future in self._decoding], wait_s, "FIRST_COMPLETED")
        before, self._decoding, outcomes = self._decoding, [], []
        for run, future in before:
            if future.done():
                outcomes += self._take_decoded(run, future)
            else:
                self._decoding.append((run, future))
        return outcomes

    def _take_decoded(self, run: Run, future: Future[Picture]) -> list[Outcome]:
        if future.cancelled():
            return []
        job, error = self._jobs.get(run.job_id), future.exception()
        if job is None or run not in job.runs:  # cancelled, or another sample of it has failed
            as_failure(error, self.unet.device.type)  # raises a device error, whoever caused it
            return []
        if is_full(error) and not run.retried_alone:
            error.__traceback__ = None  # it holds what was in memory
            run.retried_alone, self._awaited_decode = True, self._decode(run)
            return []
        if isinstance(error, JobFailed) and error.code == "nan_output":
            try:
                if self._restart_in_float32(run):
                    return []
            except (RuntimeError, MemoryError) as full:
                error = full
        if error is not None:
            return self._end(run.job_id, error)
        job.pictures[run.plan.seed] = future.result()
        if not job.draft:
            run.finish(run.result)
        return self._end(run.job_id) if len(job.pictures) == len(job.runs) else []

    def _restart_in_float32(self, run: Run) -> bool:
        """Restart an image in float32, if it was not in float32 already."""
        nets = self.nets
        if run.float32_retry or run.varied or nets.unet.dtype == nets.vae.dtype == torch.float32:
            return False
        log.warning("job %s: not a picture in %s; again in float32", run.job_id, nets.unet.dtype)
        run.float32_retry = True
        run.start(self._unet(run))
        return True

    def _in_float32(self) -> tuple[Unet, Any, Loras]:
        if self._float32 is None:
            self._loras.use(NO_LORAS)  # else the copy would have them for good
            self._float32 = in_float32(self.nets, self._folder)
        return self._float32

    def _end(self, job_id: str, error: BaseException | None = None) -> list[Outcome]:
        """Remove the job and make its outcome."""
        job = self._jobs.pop(job_id)
        if not any(r.float32_retry for other in self._jobs.values() for r in other.runs):
            self._float32 = None  # as much memory again as the checkpoint itself
        failure = as_failure(error, self.unet.device.type)
        seconds = time.monotonic() - job.started
        if failure:
            return [Outcome(job_id, (), failure, seconds)]
        return [
            Outcome(
                job_id,
                tuple(picture for _, picture in sorted(job.pictures.items())),
                None,
                seconds,
                tuple(pack(run, self._provenance(run)) for run in job.runs if job.draft),
                sum(run.call for run in job.runs),
                self._provenance(job.runs[0]),
            )
        ]


def _finished(vae: Any, run: Run) -> Picture:
    """Decode the final latent, or of a draft the estimate of it."""
    return decode(vae, run.result, run.plan.seed)
