"""A job: its request, its state, and the transitions that are allowed."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from imaged.catalogue.model import Model
from imaged.params.image_params import ImageParams
from imaged.sampling.schedulers import calls_before


class State(StrEnum):
    QUEUED = "QUEUED"
    PROCESSING = "PROCESSING"
    PARKED = "PARKED"  # a draft that rests until the caller chooses images to finish
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def final(self) -> bool:
        return self in FINAL

    @property
    def at_rest(self) -> bool:
        """Whether nothing happens until the caller acts: parked or final."""
        return self is State.PARKED or self.final


FINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED})
OPEN = frozenset(State) - FINAL

#: Allowed transitions, which the statements of store/jobs keep to. PROCESSING -> QUEUED: the worker
#: gave the job back or was lost.
MOVES: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.PROCESSING, State.FAILED, State.CANCELLED}),
    State.PROCESSING: frozenset({State.QUEUED, State.PARKED, *FINAL}),
    State.PARKED: frozenset({State.QUEUED, State.CANCELLED}),
    **{state: frozenset() for state in FINAL},
}

MAX_ATTEMPTS = 3  # a job fails after three crashes of its worker


@dataclass(frozen=True)
class Submission:
    """What one request asks for: read once, from whatever dialect it came in, and complete.

    params: as asked for; a seed of -1 is drawn when the job is queued.
    """

    key_id: int
    model: Model
    params: ImageParams
    draft_steps: int = 0  # after which all images rest; 0: no draft
    idempotency_key: str | None = None  # a second request with it gets the first one's job
    fingerprint: str | None = None  # keyed hash of a request with that key
    cancel_after_s: float | None = None  # after submit: a job still queued then fails
    quoted_micros: int | None = None  # the price of a quote; None: the model's
    quoted_until: float = math.inf  # seconds since 1970
    #: Of a replay: device kind and dtypes of the receipt, as in "cpu float32".
    made_in: str | None = None
    warnings: tuple[str, ...] = ()  # what of the request was ignored, or read differently

    @property
    def cost_micros(self) -> int:
        """The price of the whole job, in micro-dollars."""
        if self.quoted_micros is not None:
            return self.quoted_micros
        return price_micros(self.model, self.params)


@dataclass(frozen=True)
class Draft:
    """The draft of a job that rests after `steps`, and what has become of it."""

    steps: int
    calls: int = 0  # UNet calls made when it was parked, over all images
    cost_micros: int = 0  # their price
    samples: tuple[int, ...] = ()  # indices of the images chosen to finish
    varied: bool = False  # prompt or guidance changed when they were finished

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", tuple(self.samples))  # a list, as read from JSON


class JobStatus(NamedTuple):
    """What changes of a job while callers wait for it. The counts are 0 unless it is PROCESSING."""

    state: State
    epoch: int
    calls_done: int = 0
    preview_call: int = 0


@dataclass(frozen=True)
class Job:
    """One row of the queue; times are seconds since 1970, money is micro-dollars."""

    id: str
    key_id: int
    model: str
    params: ImageParams
    state: State
    epoch: int  # number of claims; a fencing token: a worker's writes carry it
    attempts: int
    worker_id: str | None
    cost_micros: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    expires_at: float | None
    reason: str | None  # of a FAILED or CANCELLED job, for machines
    error: str | None  # the same for people
    result: Mapping[str, Any] | None  # see worker/deliver.py
    calls_done: int = 0  # UNet calls made, over all images
    preview_call: int = 0  # UNet call of the newest preview; 0: there is none
    remaining_micros: int | None = None  # the key's free credits when the job ended
    draft: Draft | None = None
    made_in: str | None = None  # see Submission

    @property
    def status(self) -> JobStatus:
        counts = (self.calls_done, self.preview_call) if self.state is State.PROCESSING else ()
        return JobStatus(self.state, self.epoch, *counts)

    @property
    def unet_calls(self) -> int:
        """UNet calls of all images that run, up to their end or to where they rest."""
        if self.draft is None:
            return self.params.unet_calls * self.params.samples
        if self.draft.samples:
            return self.params.unet_calls * len(self.draft.samples)
        return self._calls_of_draft * self.params.samples

    @property
    def _calls_of_draft(self) -> int:
        """UNet calls of one image up to the draft."""
        assert self.draft is not None
        return calls_before(self.params.scheduler, self.draft.steps)

    def cost_of(self, calls: int) -> int:
        """The price of so many of its UNet calls, in micro-dollars."""
        return price_of_calls(self.cost_micros, calls, self.params)

    @property
    def owed_micros(self) -> int:
        """What is charged at completion, in micro-dollars."""
        if self.draft is None:
            return self.cost_micros
        rest = (self.params.unet_calls - self._calls_of_draft) * len(self.draft.samples)
        return self.cost_of(self.draft.calls + rest)


@dataclass(frozen=True)
class Preview:
    """A small JPEG of a running job's first image, made after UNet call number `call`."""

    call: int
    jpeg: bytes


@dataclass(frozen=True)
class JobReport:
    """A worker's report of a job it runs; without a preview the stored one stays."""

    epoch: int
    calls: int  # UNet calls made, over all images
    preview: bytes | None = None  # JPEG
    preview_call: int = 0


def price_micros(model: Model, params: ImageParams) -> int:
    """Price of a whole job: proportional to pixels, UNet calls and samples; never zero."""
    pixels = params.img_width * params.img_height / (1024 * 1024)
    share = pixels * params.unet_calls / 25 * params.samples
    return max(1, math.ceil(model.price_micros * share))


def price_of_calls(cost_micros: int, calls: int, params: ImageParams) -> int:
    """The part of a job's price for so many of its UNet calls, rounded up; micro-dollars."""
    return max(1, -(-cost_micros * calls // (params.unet_calls * params.samples)))


def new_job_id() -> str:
    return secrets.token_hex(16)
