"""The hook for an image checker: refused pictures leave nothing, and doubt refuses too."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imaged.engine.decode import Picture
from imaged.engine.outcome import Outcome
from imaged.errors import CommandError
from imaged.jobs import Job, State
from imaged.settings import Settings
from imaged.store.blobs import Blobs
from imaged.store.sql.database import Database
from imaged.worker import deliver, image_checker
from imaged.worker.deliver import Delivery, Stamp
from tests.conftest import imaged, serving
from tests.in_store import audit, claim, free, get, make_key, put, worker

RED, BLUE = bytes([250, 0, 0]) * 64, bytes([0, 0, 250]) * 64
HERE = "tests.flow.test_image_checker"


def no_red(rgb: bytes, width: int, height: int) -> str | None:
    assert len(rgb) == width * height * 3
    return "too\nred" if rgb[0] > 200 else None


def broken(rgb: bytes, width: int, height: int) -> str | None:
    raise RuntimeError("out of order")


def hangs(rgb: bytes, width: int, height: int) -> str | None:
    time.sleep(30)
    return None


def talks_nonsense(rgb: bytes, width: int, height: int) -> Any:
    return False


def delivered(db: Database, tmp_path: Path, checker: str, *pixels: bytes) -> tuple[Job, int]:
    """A job whose pictures were delivered under this checker, and how many files there are."""
    key_id = make_key(db)
    job_id = put(db, key_id)
    worker(db)
    [job] = claim(db)
    folder = tmp_path / "files"
    delivery = Delivery(db, Blobs(f"file://{folder}"), "w", Settings(checker=checker))
    pictures = tuple(Picture(rgb, 8, 8, seed) for seed, rgb in enumerate(pixels))
    delivery.deliver(job, Outcome(job_id, pictures, None, 1.0), Stamp("micro", "exact", "CPU"))
    done = get(db, job_id)
    assert free(db, key_id) == (990 if done.state is State.COMPLETED else 1000)
    assert audit(db) == []
    return done, sum(path.is_file() for path in folder.rglob("*"))


def test_allowed_pictures_are_delivered(db: Database, tmp_path: Path) -> None:
    job, files = delivered(db, tmp_path, f"{HERE}:no_red", BLUE, BLUE)
    assert (job.state, files) == (State.COMPLETED, 2)


def test_one_refused_picture_refuses_the_job_and_no_file_is_written(
    db: Database, tmp_path: Path
) -> None:
    job, files = delivered(db, tmp_path, f"{HERE}:no_red", BLUE, RED)
    assert (job.state, job.reason, files) == (State.FAILED, "content_policy", 0)
    assert job.error == "The picture was refused by the content policy: too red"


@pytest.mark.parametrize("name", ["broken", "talks_nonsense"])
def test_a_checker_in_doubt_refuses(db: Database, tmp_path: Path, name: str) -> None:
    job, files = delivered(db, tmp_path, f"{HERE}:{name}", BLUE)
    assert (job.state, job.reason, files) == (State.FAILED, "checker_unavailable", 0)
    assert "out of order" not in (job.error or "")


def test_a_checker_that_hangs_refuses(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_checker, "LOCAL_TIMEOUT_S", 0.1)
    job, files = delivered(db, tmp_path, f"{HERE}:hangs", BLUE)
    assert (job.state, job.reason, files) == (State.FAILED, "checker_unavailable", 0)


def test_mutant_that_fails_open_is_seen(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliver, "judge", lambda *_: None)
    assert delivered(db, tmp_path, f"{HERE}:broken", BLUE)[0].state is State.COMPLETED


# -- a service -----------------------------------------------------------------------------------


class Service(BaseHTTPRequestHandler):
    """Answers by its path; keeps what was posted."""

    seen: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.seen.append((self.headers["content-type"], body))
        status, answer = {
            "/allow": (200, b'{"allowed": true}'),
            "/refuse": (200, json.dumps({"allowed": False, "reason": "r" * 999}).encode()),
            "/silent-refusal": (200, b'{"allowed": false}'),
            "/error": (500, b'{"allowed": true}'),
            "/moved": (307, b'{"allowed": true}'),
            "/truthy": (200, b'{"allowed": 1}'),
            "/list": (200, b"[true]"),
            "/text": (200, b"fine"),
            "/large": (200, b'{"allowed": true}' + b" " * 70_000),
        }.get(self.path, (200, b""))
        if self.path == "/slow":  # one byte at a time: no single read takes long
            self.send_response(200)
            self.end_headers()
            for _ in range(400):
                self.wfile.write(b" ")
                time.sleep(0.05)
            answer = b'{"allowed": true}'
        else:
            self.send_response(status)
            self.send_header("location", "/allow")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    Service.seen = []
    with serving(Service) as server:
        yield f"http://127.0.0.1:{server.server_port}"


def test_a_service_sees_the_jpeg_and_may_allow_or_refuse(
    db: Database, tmp_path: Path, service: str
) -> None:
    job, files = delivered(db, tmp_path, f"{service}/allow", BLUE)
    assert (job.state, files) == (State.COMPLETED, 1)
    [(kind, body)] = Service.seen
    assert kind == "image/jpeg"
    with Image.open(io.BytesIO(body)) as image:
        assert image.size == (8, 8) and image.format == "JPEG"
    [stored] = [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
    assert stored.read_bytes() == body


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("refuse", "content_policy"),
        ("silent-refusal", "content_policy"),
        *(
            (path, "checker_unavailable")
            for path in ("error", "moved", "truthy", "list", "text", "large", "nothing", "slow")
        ),
    ],
)
def test_whatever_else_a_service_answers_refuses(
    db: Database,
    tmp_path: Path,
    service: str,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    reason: str,
) -> None:
    if path == "slow":
        monkeypatch.setattr(image_checker, "TIMEOUT_S", 0.3)
    job, files = delivered(db, tmp_path, f"{service}/{path}", BLUE)
    assert (job.state, job.reason, files) == (State.FAILED, reason, 0)
    assert len(job.error or "") < 300
    assert len(Service.seen) == 1  # a redirect is not followed


def test_a_service_that_is_not_there_refuses(db: Database, tmp_path: Path) -> None:
    job, files = delivered(db, tmp_path, "http://127.0.0.1:9/", BLUE)
    assert (job.reason, files) == ("checker_unavailable", 0)


# -- the setting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("ftp://host/", "should be package.module:callable"),
        ("just.a.module", "should be package.module:callable"),
        ("a b:c", "should be package.module:callable"),
        ("no.such.module:f", "cannot be loaded"),
        (f"{HERE}:nothing", "cannot be loaded"),
        (f"{HERE}:RED", "is not callable"),
        ("http://", "should name a host"),
        ("http://host:port/", "is no URL"),
    ],
)
def test_a_wrong_setting_is_told(setting: str, problem: str) -> None:
    with pytest.raises(CommandError, match=problem):
        image_checker.load_check(setting)


@pytest.mark.slow
def test_a_wrong_setting_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGED_CHECKER", "no.such.module:f")
    done = imaged("serve", "--data", str(tmp_path / "data"))
    assert done.returncode == 1 and "IMAGED_CHECKER: no.such.module:f" in done.stderr


def test_without_a_setting_there_is_none() -> None:
    assert image_checker.load_check("") is None


def test_the_gateway_can_load_it_without_torch() -> None:
    code = "import sys, imaged.worker.image_checker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
