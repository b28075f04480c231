"""Snapshots: an image under way as bytes, from which it resumes with the same bits.

Between two UNet calls an image is its seed, the number of calls made and their outputs; the noise
follows from the seed. A snapshot is a safetensors file of one tensor, `outputs` (calls, C, h, w)
float32, or once all calls are made `latent` (C, h, w). Its metadata hold what made it (Provenance).
A call of a 1024 x 1024 image adds 256 KiB. It contains data only, no code.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from imaged import __version__
from imaged.engine.loading.load import Nets
from imaged.engine.run import Run
from imaged.errors import SnapshotRefused

log = logging.getLogger(__name__)

FORMAT = "1"
ENGINE = f"{__version__}, torch {torch.__version__}"
PLACE = ("device", "dtype", "determinism")
SAID = {
    "engine": "another version of the engine",
    "checkpoint": "other weights",
    "table": "another table of its sampler",
    "loras": "other LoRAs",
    "device": "another device or processor, or another number of threads",
    "dtype": "numbers of another type",
    "determinism": "the other determinism class",
    "seed": "another seed",
}


@dataclass(frozen=True)
class Provenance:
    """What affects an image's bits beside request and seed; digests are SHA-256."""

    engine: str
    checkpoint: str
    table: str
    loras: str  # "name digest", separated by commas
    device: str
    dtype: str
    determinism: str

    @classmethod
    def of(cls, run: Run, nets: Nets, device: str, *, exact: bool) -> Provenance:
        loras = ", ".join(f"{name} {digest}" for name, digest in run.loras.digests)
        dtypes = dict.fromkeys(
            str(net.dtype).removeprefix("torch.") for net in (nets.unet, nets.vae)
        )
        what = (ENGINE, nets.sha256, run.plan.table.digest, loras)
        return cls(*what, device, " and ".join(dtypes), "exact" if exact else "close")


@dataclass(frozen=True)
class RunPlan:
    """Which images of a job run, from where and to where.

    draft:   the step after which every image rests; 0: they run to the end.
    samples: indices of the images that run; empty: all.
    snapshots: to resume from, by sample index.
    varied:  prompt or guidance changed since the snapshots were taken.
    """

    draft: int = 0
    samples: tuple[int, ...] = ()
    snapshots: Mapping[int, bytes] = field(default_factory=dict)
    varied: bool = False


WHOLE = RunPlan()


def pack(run: Run, provenance: Provenance) -> bytes:
    """A snapshot of an image between two calls."""
    if run.latent is not None:
        tensors = {"latent": run.latent}
    else:
        tensors = {"outputs": run.history.columns[1 : 1 + run.call]}
    said = {**asdict(provenance), "format": FORMAT, "seed": str(run.plan.seed)}
    said["precise"] = "yes" if run.float32_retry else "no"
    packed: bytes = save({n: value.cpu().contiguous() for n, value in tensors.items()}, said)
    return packed


@dataclass(frozen=True)
class Saved:
    """A snapshot that was accepted.

    content: the final latent if `whole`, else the outputs so far. float32_retry: as in Run.
    """

    content: torch.Tensor
    whole: bool
    float32_retry: bool


def read(run: Run, resume_plan: RunPlan, provenance: Provenance) -> Saved | None:
    """The snapshot to resume an image from; None to start it anew.

    A snapshot of another image or provenance, or a damaged one, is refused: the image starts anew,
    which gives the same bits. With `varied` it would not: raises SnapshotRefused; on the other hand
    such an image may resume on any device, because its last bits are not promised.
    """
    if run.sample not in resume_plan.snapshots and not run.varied:
        return None
    try:
        return _saved(resume_plan.snapshots.get(run.sample, b""), run, provenance)
    except SnapshotRefused as error:
        if run.varied:
            raise
        log.warning("job %s begins anew: %s", run.job_id, error.detail)
        return None


def _saved(content: bytes, run: Run, provenance: Provenance) -> Saved:
    said, tensors = _read(content)
    if said.get("format") != FORMAT:
        raise SnapshotRefused("it is of another format")
    for name, value in {**asdict(provenance), "seed": str(run.plan.seed)}.items():
        if said.get(name) != value and not (run.varied and name in PLACE):
            raise SnapshotRefused(f"it was made with {SAID[name]}")
    shape, float32_retry = run.plan.latent_shape, said.get("precise") == "yes"
    latent, outputs = tensors.get("latent"), tensors.get("outputs")
    if latent is not None and latent.shape == shape:
        return Saved(latent, whole=True, float32_retry=float32_retry)
    if outputs is None or outputs.shape[1:] != shape or len(outputs) > run.plan.table.calls:
        raise SnapshotRefused("it is of a picture of another size")
    return Saved(outputs, whole=False, float32_retry=float32_retry)


def resume(run: Run, saved: Saved) -> None:
    """Bring a started image to where its snapshot was taken."""
    if saved.whole:
        run.finish(saved.content)
    else:
        for output in saved.content:
            run.advance(output)
    log.info("job %s goes on after %d calls", run.job_id, run.call)


def _read(content: bytes) -> tuple[Mapping[str, str], Mapping[str, torch.Tensor]]:
    try:
        length = int.from_bytes(content[:8], "little")
        return json.loads(content[8 : 8 + length])["__metadata__"], load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise SnapshotRefused("it is not whole") from error
