"""A job: what was asked, where it stands, and the only moves it can make."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from imaged.params import ImageParams
from imaged.schedulers import calls_before


class State(StrEnum):
    QUEUED = "QUEUED"
    PROCESSING = "PROCESSING"
    PARKED = "PARKED"  # a draft: it rests until somebody has chosen what goes on
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def final(self) -> bool:
        return self in FINAL

    @property
    def waits(self) -> bool:
        """Nothing more happens by itself."""
        return self is State.PARKED or self.final


FINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED})
OPEN = frozenset(State) - FINAL

#: From state to states; PROCESSING -> QUEUED only when a worker gave the job back or was lost.
MOVES: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.PROCESSING, State.FAILED, State.CANCELLED}),
    State.PROCESSING: frozenset({State.QUEUED, State.PARKED, *FINAL}),
    State.PARKED: frozenset({State.QUEUED, State.CANCELLED}),
    **{state: frozenset() for state in FINAL},
}

MAX_ATTEMPTS = 3  # a job that three workers died of fails; it does not loop


@dataclass(frozen=True)
class Terms:
    """What a caller asks of a job's handling, beside what the picture shows."""

    idempotency_key: str | None = None  # a second job under it is the first one
    fingerprint: str | None = None  # what was asked under it, as a keyed hash
    cancel_after_s: float | None = None  # from submit: who still waits then has waited in vain
    quoted_micros: int | None = None  # a price that was promised; else the model's
    draft_steps: int = 0  # after which all pictures rest; 0: they do not
    #: Of a picture that is made again, kind of device and types of numbers, as in "cpu float32".
    made_in: str | None = None


NO_TERMS = Terms()


@dataclass(frozen=True)
class Draft:
    """What is asked of a job that rests after some `steps`, and what has become of it."""

    steps: int
    calls: int = 0  # UNet calls behind it when it was parked, over all pictures
    cost_micros: int = 0  # what these cost
    samples: tuple[int, ...] = ()  # the pictures that were chosen to go on
    varied: bool = False  # they go on as another request

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", tuple(self.samples))  # a list, as read from JSON


class Stand(NamedTuple):
    """Where a job stands: what changes of it while others wait for it. The counts are those of a
    job that is PROCESSING, else 0.
    """

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
    epoch: int  # how often it was claimed; every write of a worker carries it
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
    calls_done: int = 0  # UNet calls over all pictures
    preview_call: int = 0  # the call after which the newest preview was made; 0: there is none
    remaining_micros: int | None = None  # the key's free credits when the job ended
    draft: Draft | None = None
    made_in: str | None = None  # see Terms

    @property
    def stand(self) -> Stand:
        counts = self.calls_done, self.preview_call
        return Stand(self.state, self.epoch, *(counts if self.state is State.PROCESSING else ()))

    @property
    def unet_calls(self) -> int:
        """UNet calls over all pictures that are made, up to where these end or rest."""
        if self.draft is None:
            return self.params.unet_calls * self.params.samples
        if self.draft.samples:
            return self.params.unet_calls * len(self.draft.samples)
        return self._calls_of_draft * self.params.samples

    @property
    def _calls_of_draft(self) -> int:
        """UNet calls of one picture."""
        assert self.draft is not None
        return calls_before(self.params.scheduler, self.draft.steps)

    def cost_of(self, calls: int) -> int:
        """What so many of all its UNet calls cost, in micro-dollars."""
        return share(self.cost_micros, calls, self.params)

    @property
    def owed_micros(self) -> int:
        """The price of what is made of it, once that is done."""
        if self.draft is None:
            return self.cost_micros
        rest = (self.params.unet_calls - self._calls_of_draft) * len(self.draft.samples)
        return self.cost_of(self.draft.calls + rest)


@dataclass(frozen=True)
class Preview:
    """A small JPEG of a running job's first picture, made after UNet call `call`."""

    call: int
    jpeg: bytes


@dataclass(frozen=True)
class Held:
    """What a worker tells of a job in its hands; without a `preview` the last one stays."""

    epoch: int
    calls: int  # UNet calls made, over all pictures
    preview: bytes | None = None  # JPEG
    preview_call: int = 0


def share(cost_micros: int, calls: int, params: ImageParams) -> int:
    """Of a request's price what so many of its UNet calls cost, rounded up; micro-dollars."""
    return max(1, -(-cost_micros * calls // (params.unet_calls * params.samples)))


def new_job_id() -> str:
    return secrets.token_hex(16)
