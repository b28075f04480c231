"""Admission of a key's next job: token bucket, credits, place in the fair order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from imaged.errors import NoCredits, TooFast
from imaged.store.accounts import ledger
from imaged.store.sql.schema import api_keys


@dataclass(frozen=True)
class RateLimit:
    """State of a key's token bucket: `left` of `limit` now, full again at `full_at`."""

    limit: int
    left: int
    full_at: float  # seconds since 1970

    @property
    def next_at(self) -> float:
        """When the next token is there, seconds since 1970; in the past if there is one."""
        return self.full_at - (self.limit - 1) * 60 / self.limit


def rate_limit(key: Any, now: float, taken: int = 0) -> RateLimit:
    """The bucket of a key's row after `taken` more tokens."""
    bucket = _bucket(key, now) - taken
    return RateLimit(key.rpm, int(bucket), now + (key.rpm - bucket) * 60 / key.rpm)


def take_and_reserve(
    connection: sa.Connection, key: Any, job_id: str, cost_micros: int, now: float
) -> tuple[float, RateLimit]:
    """Take a token and reserve the price; returns the job's tag (virtual start time) and the
    bucket.

    Raises TooFast or NoCredits.
    """
    bucket = _take_token(key, now)
    tag: float = max(key.tag, now)
    if not ledger.reserve(connection, key.id, job_id, cost_micros, now):
        raise NoCredits(
            f"Not enough credits: this job costs {cost_micros / 1e6:.6f} and "
            f"{(key.balance_micros - key.reserved_micros) / 1e6:.6f} are left"
        )
    connection.execute(
        api_keys.update()
        .where(api_keys.c.id == key.id)
        .values(bucket=bucket, bucket_at=now, tag=tag + cost_micros / 1000)
    )
    return tag, rate_limit(key, now, taken=1)


def _take_token(key: Any, now: float) -> float:
    """Tokens left after taking one; raises TooFast."""
    bucket = _bucket(key, now)
    if bucket < 1:
        raise TooFast(reset_in_s=(1 - bucket) * 60 / key.rpm, now=now)
    return bucket - 1


def _bucket(key: Any, now: float) -> float:
    refilled: float = key.bucket + max(0.0, now - key.bucket_at) * key.rpm / 60
    return min(float(key.rpm), refilled)
