"""Units of answers: dollars, ISO 8601."""

from __future__ import annotations

from datetime import UTC, datetime


def dollars(micros: int) -> float:
    return micros / 1_000_000


def utc(at: float) -> str:
    """Seconds since 1970 -> ISO 8601 in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat()
