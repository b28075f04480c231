"""Absolute URLs of jobs and picture files."""

from __future__ import annotations

from dataclasses import dataclass

from imaged.jobs import Job
from imaged.store import blobs


@dataclass(frozen=True)
class Links:
    """URLs under one origin."""

    origin: str
    secret: bytes

    def job(self, job_id: str) -> dict[str, str]:
        return {
            "poll_url": f"{self.origin}/v1/requests/{job_id}",
            "status_url": f"{self.origin}/v2/requests/{job_id}/status",
            "response_url": f"{self.origin}/v2/requests/{job_id}",
        }

    def file(self, job: Job, name: str) -> str:
        assert job.expires_at is not None
        return self.signed(name, int(job.expires_at))

    def signed(self, name: str, expires_at: int) -> str:
        """A signed link to an image file, valid until `expires_at` (seconds since 1970)."""
        return f"{self.origin}/files/{name}?{blobs.sign(self.secret, name, expires_at)}"


def media_type(name: str) -> str:
    """Media type of an image file, by its ending."""
    return "image/png" if name.endswith(".png") else "image/jpeg"
