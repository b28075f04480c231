"""A job: what was asked, where it stands, and the only moves it can make."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from imaged.params import ImageParams


class State(StrEnum):
    QUEUED = "QUEUED"
    PROCESSING = "PROCESSING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def final(self) -> bool:
        return self in FINAL


FINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED})

#: From state to states; PROCESSING -> QUEUED only when a worker gave the job back or was lost.
MOVES: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.PROCESSING, State.FAILED, State.CANCELLED}),
    State.PROCESSING: frozenset({State.QUEUED, *FINAL}),
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


NO_TERMS = Terms()


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

    @property
    def unet_calls(self) -> int:
        """UNet calls over all pictures."""
        return self.params.unet_calls * self.params.samples


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


def new_job_id() -> str:
    return secrets.token_hex(16)
