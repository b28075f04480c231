"""What a key may still take: a token of its rate, its money, a place in the fair order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from imaged.errors import NoCredits, TooFast
from imaged.store import ledger
from imaged.store.schema import api_keys


@dataclass(frozen=True)
class Share:
    """What a key may still submit: `left` of `limit` at once, all of it again at `full_at`."""

    limit: int
    left: int
    full_at: float  # seconds since 1970

    @property
    def next_at(self) -> float:
        """From when on there is one to submit, in seconds since 1970; past if there is now."""
        return self.full_at - (self.limit - 1) * 60 / self.limit


def share(key: Any, now: float, taken: int = 0) -> Share:
    """The key's share once it has `taken` so many tokens."""
    bucket = _bucket(key, now) - taken
    return Share(key.rpm, int(bucket), now + (key.rpm - bucket) * 60 / key.rpm)


def hold(
    connection: sa.Connection, key: Any, job_id: str, cost_micros: int, now: float
) -> tuple[float, Share]:
    """A token and the price from the key's row; the job's tag in the fair order, and the share
    that is left.
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
    return tag, share(key, now, taken=1)


def _take_token(key: Any, now: float) -> float:
    """What is left in the key's bucket, which refills at `rpm` a minute; raises TooFast."""
    bucket = _bucket(key, now)
    if bucket < 1:
        raise TooFast(reset_in_s=(1 - bucket) * 60 / key.rpm, now=now)
    return bucket - 1


def _bucket(key: Any, now: float) -> float:
    refilled: float = key.bucket + max(0.0, now - key.bucket_at) * key.rpm / 60
    return min(float(key.rpm), refilled)
