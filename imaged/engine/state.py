"""A picture under way as bytes, so that it goes on elsewhere as if nothing had happened.

Between two UNet calls a picture is its seed, the number of calls made and their outputs: the noise
comes from the seed again. So a state is a safetensors file with one tensor, `outputs` (calls, C,
h, w) float32, or of a picture that has made all its calls `latent` (C, h, w) alone. Its metadata
say what made it. A call of a picture of 1024 x 1024 adds 256 KiB. Nothing in it can be run.
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
from imaged.engine.load import Nets
from imaged.engine.run import Run
from imaged.errors import StateRefused

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
class Maker:
    """What decides a picture's bits beside its request and its seed; digests are SHA-256."""

    engine: str
    checkpoint: str
    table: str
    loras: str  # "name digest", separated by commas
    device: str
    dtype: str
    determinism: str

    @classmethod
    def of(cls, run: Run, nets: Nets, device: str, *, exact: bool) -> Maker:
        loras = ", ".join(f"{name} {digest}" for name, digest in run.loras.digests)
        dtypes = dict.fromkeys(
            str(net.dtype).removeprefix("torch.") for net in (nets.unet, nets.vae)
        )
        what = (ENGINE, nets.sha256, run.plan.table.digest, loras)
        return cls(*what, device, " and ".join(dtypes), "exact" if exact else "close")


@dataclass(frozen=True)
class Course:
    """How far a job's pictures go, and from where.

    draft:   the step after which every picture rests; 0: they go to the end.
    samples: the pictures of the job that are made; empty: all.
    states:  by sample, where a picture goes on from.
    varied:  whether the request is another one from there on.
    """

    draft: int = 0
    samples: tuple[int, ...] = ()
    states: Mapping[int, bytes] = field(default_factory=dict)
    varied: bool = False


WHOLE = Course()


def pack(run: Run, maker: Maker) -> bytes:
    """The state of a picture between two calls."""
    if run.latent is not None:
        tensors = {"latent": run.latent}
    else:
        tensors = {"outputs": run.history[1 : 1 + run.call]}
    said = {**asdict(maker), "format": FORMAT, "seed": str(run.plan.seed)}
    said["precise"] = "yes" if run.precise else "no"
    packed: bytes = save({n: value.cpu().contiguous() for n, value in tensors.items()}, said)
    return packed


@dataclass(frozen=True)
class Saved:
    """A state that may go on: the last latent, where all calls are made, or their outputs so far.
    `precise`: it is of a second try, in float32.
    """

    content: torch.Tensor
    whole: bool
    precise: bool


def read(run: Run, course: Course, maker: Maker) -> Saved | None:
    """Where a picture goes on that has not been started yet: its state decides what with. None for
    the start. A state of another picture or another maker, or what is none, is refused: then it
    begins anew, if that gives the same; raises StateRefused where it does not.

    One that goes on as another request does so on any device: its last bits are not promised.
    """
    if run.sample not in course.states and not run.varied:
        return None
    try:
        return _saved(course.states.get(run.sample, b""), run, maker)
    except StateRefused as error:
        if run.varied:
            raise
        log.warning("job %s begins anew: %s", run.job_id, error.detail)
        return None


def _saved(content: bytes, run: Run, maker: Maker) -> Saved:
    said, tensors = _read(content)
    if said.get("format") != FORMAT:
        raise StateRefused("it is of another format")
    for name, value in {**asdict(maker), "seed": str(run.plan.seed)}.items():
        if said.get(name) != value and not (run.varied and name in PLACE):
            raise StateRefused(f"it was made with {SAID[name]}")
    shape, precise = run.plan.latent_shape, said.get("precise") == "yes"
    latent, outputs = tensors.get("latent"), tensors.get("outputs")
    if latent is not None and latent.shape == shape:
        return Saved(latent, whole=True, precise=precise)
    if outputs is None or outputs.shape[1:] != shape or len(outputs) > run.plan.table.calls:
        raise StateRefused("it is of a picture of another size")
    return Saved(outputs, whole=False, precise=precise)


def resume(run: Run, saved: Saved) -> None:
    """Bring a picture that has just been started to where its state was taken."""
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
        raise StateRefused("it is not whole") from error
