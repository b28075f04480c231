"""From a job's request to its images under way."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from imaged.engine.loading.load import Nets
from imaged.engine.net_variants import NetVariants
from imaged.engine.outcome import EngineJob
from imaged.engine.plan import plan_images
from imaged.engine.prompt.encode import PromptEncoder
from imaged.engine.run import Run
from imaged.engine.snapshot import Provenance, read, resume
from imaged.sampling.schedulers import calls_before


class Intake:
    """Plans jobs, reads their LoRAs, encodes their texts and resumes their snapshots.

    embeddings: folder of their files. provenance: of an image made here.
    """

    def __init__(
        self,
        nets: Nets,
        variants: NetVariants,
        embeddings: Path | None,
        provenance: Callable[[Run], Provenance],
    ) -> None:
        self._nets, self._variants, self._provenance = nets, variants, provenance
        self._encoder = PromptEncoder(nets, embeddings)

    def start(self, job: EngineJob) -> list[Run]:
        """The job's images, each before its first call or where its snapshot was taken.

        Raises JobFailed, SnapshotRefused, out of memory, and whatever a prompt may cause.
        """
        nets, params, resume_plan = self._nets, job.params, job.resume_plan
        plans = plan_images(params, nets.scheduler_config, nets.channels, nets.vae_scale_factor)
        loras = self._variants.loras.find(params.all_loras)
        self._variants.loras.use(loras)
        positive, negative = self._encoder.by_step(*params.prompts, loras)
        texts = (negative, positive) if plans[0].guided else (positive,)
        now = time.monotonic()
        park_at = calls_before(params.scheduler, resume_plan.draft) if resume_plan.draft else None
        shared: dict[int, torch.Tensor] = {}
        runs = []
        for k in resume_plan.samples or range(len(plans)):
            run = Run(job.job_id, plans[k], texts, loras, job.key_id, now, sample=k)
            run.park_at, run.varied = park_at, resume_plan.varied
            saved = read(run, resume_plan, self._provenance(run))
            run.float32_retry = saved is not None and saved.float32_retry
            run.start(self._variants.unet_of(run), {} if run.float32_retry else shared)
            if saved is not None:
                resume(run, saved)
            runs.append(run)
        return runs
