"""Files in a folder: images, with signed links to them, and snapshots."""

from __future__ import annotations

import os
import re
from pathlib import Path

from imaged.errors import CommandError
from imaged.store.signing import mac, same

PICTURE = re.compile(r"[0-9a-f]{32}-[0-9]{1,6}-[0-9]\.(jpeg|png)")
SNAPSHOT = re.compile(r"[0-9a-f]{32}-[0-9]{1,6}-[0-9]\.state")


class Blobs:
    """Files named by job, epoch and image index. The content of a name never changes."""

    def __init__(self, url: str) -> None:
        if not url.startswith("file://"):
            raise CommandError("IMAGED_BLOBS_URL should begin with file:// in this version")
        self.folder = Path(url.removeprefix("file://"))
        self.folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, content: bytes) -> None:
        """Write a file durably and atomically: temporary file, fsync, rename, fsync of the
        folder.
        """
        path = self._path(name)
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            with part.open("wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)  # on a full disk it would take the room
            raise
        _sync_folder(path.parent)

    def read(self, name: str) -> bytes | None:
        """The content, or None without such a file."""
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def delete_of(self, job_id: str) -> None:
        """Delete every file of a job, of all its attempts."""
        for path in (self.folder / job_id[:2]).glob(f"{job_id}-*"):
            path.unlink(missing_ok=True)

    def snapshots_of(self, job_id: str) -> list[str]:
        """Names of a job's snapshots, in order of their epoch."""
        paths = (self.folder / job_id[:2]).glob(f"{job_id}-*.state")
        names = [path.name for path in paths if SNAPSHOT.fullmatch(path.name)]
        return sorted(names, key=lambda name: int(name.split("-")[1]))

    def delete_snapshots_of(self, job_id: str) -> None:
        for name in self.snapshots_of(job_id):
            self.delete(name)

    def job_ids(self, older_than: float) -> set[str]:
        """Ids of the jobs with files written before a time, seconds since 1970."""
        files = (path for path in self.folder.glob("*/*-*") if path.stat().st_mtime < older_than)
        return {path.name.partition("-")[0] for path in files}

    def _path(self, name: str) -> Path:
        assert PICTURE.fullmatch(name) or SNAPSHOT.fullmatch(name), name
        return self.folder / name[:2] / name


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sign(secret: bytes, name: str, expires_at: int) -> str:
    """The query string of a link that works for anyone until `expires_at`."""
    return f"exp={expires_at}&sig={_signature(secret, name, expires_at)}"


def verify(secret: bytes, name: str, exp: str, sig: str, now: float) -> bool:
    """Whether a link was signed with this secret and has not expired."""
    if not exp.isascii() or not exp.isdigit() or len(exp) > 12 or now >= int(exp):
        return False
    return same(_signature(secret, name, int(exp)).encode(), sig.encode("utf-8", "replace"))


def _signature(secret: bytes, name: str, expires_at: int) -> str:
    return mac(secret, f"file:{name}:{expires_at}".encode()).hex()[:40]
