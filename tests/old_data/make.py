"""Makes the data folder of one version, which tests/flow/test_old_data.py opens with today's code.

python tests/old_data/make.py COMMIT     (a commit, or a release's tag; about half a minute)

checks COMMIT out into a temporary folder, lets its own code serve there, has done what people do,
and writes tests/old_data/COMMIT.tar.gz: the folder `data` as that version left it, and `told.json`
with what it said of itself. A version that changes the schema, or what lies in the folder, adds its
file when it is released; none is ever made again or taken away. What a later version can do more
is asked for here under a condition, or the older ones could not be made by this script any more.

Records end after an hour and waiting jobs too; here they are given three thousand years, by the
settings and not by hand, so that the day on which they are opened does not matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pysqlite3.dbapi2 as sqlite

HERE = Path(__file__).resolve().parent
SLUG = "sdxl1.0-yamers-realistic"
LONG = "100000000000"  # seconds
JOB = {"img_width": 256, "img_height": 256, "num_inference_steps": 6, "guidance_scale": 5.0}
ALIASES = f'[alias.our-houses]\nmodel = "{SLUG}"\n'
NOBODY = "http://127.0.0.1:9999/hook"  # where nobody listens: the message waits


def main(commit: str) -> None:
    with tempfile.TemporaryDirectory(prefix="imaged-") as folder:
        source = Path(folder) / "imaged"
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(source), commit], check=True)
        try:
            told = make(source)
            pack(source, told, HERE / f"{commit}.tar.gz")
        finally:
            subprocess.run([*git, "remove", "--force", str(source)], check=True)


def make(source: Path) -> dict[str, Any]:
    """Everything that is in the folder; returns what its version said of it."""
    data = source / "data"
    data.mkdir()
    (data / "models.toml").write_text((source / "tests" / "few_steps.toml").read_text())
    (data / "aliases.toml").write_text(ALIASES)
    told: dict[str, Any] = {}
    with serving(source, IMAGED_RETENTION_S="1") as client:  # of one job the history alone is left
        told["forgotten"] = submit(client, prompt="a white house by the sea, dawn", seed=1)
        until(lambda: client.get(f"/v2/requests/{told['forgotten']}/status").status_code == 404)
    narrow = ("--name", "narrow", "--credits", "2.5", "--model", "our-houses")
    told["narrow_key"] = run(source, "keys", "create", *narrow)
    told["revoked_key"] = run(source, "keys", "create", "--name", "gone")
    run(source, "keys", "revoke", "3")
    with serving(source) as client:
        told |= work(client)
    with serving(source, workers=0) as client:  # stopped while a job waits
        told["waiting"] = submit(client, prompt="a red boat on a lake", seed=4)
        told["history"] = client.get("/inference-request/request-history").json()
        told["credits"] = client.get("/v1/get-user-credits").json()
    told["keys_list"] = run(source, "keys", "list")
    return told


def work(client: httpx.Client) -> dict[str, Any]:
    """A webhook, a finished job, a draft that rests."""
    told: dict[str, Any] = {}
    asked = {"webhook_url": NOBODY, "event": {"types": ["GENERATION"]}}
    told["webhook"] = client.post("/webhook/add", json=asked).raise_for_status().json()
    told["asked"] = {**JOB, "prompt": "a red house by a blue lake", "seed": 2}
    done = submit(client, **told["asked"], idempotency="first")
    until(lambda: status(client, done)["status"] == "COMPLETED")
    told["done"] = client.get(f"/v2/requests/{done}").json()
    [image] = told["done"]["images"]
    told["picture_sha256"] = hashlib.sha256(client.get(image["url"]).content).hexdigest()
    log = f"/webhook/dispatch-logs?webhook_id={told['webhook']['webhook_id']}"
    until(lambda: '"attempts": 1' in json.dumps(client.get(log).json()))
    told["log"] = client.get(log).json()
    two: dict[str, Any] = {"prompt": "a green prairie, noon", "seed": 3, "samples": 2}
    told["draft"] = submit(client, **two, draft={"steps": 3})
    until(lambda: status(client, told["draft"]).get("progress", {}).get("parked"))
    return told


def submit(client: httpx.Client, idempotency: str | None = None, **params: Any) -> str:
    headers = {"idempotency-key": idempotency} if idempotency else {}
    answer = client.post(f"/v2/{SLUG}", json={**JOB, **params}, headers=headers)
    return str(answer.raise_for_status().json()["request_id"])


def status(client: httpx.Client, job_id: str) -> Any:
    return client.get(f"/v2/requests/{job_id}/status").json()


def until(done: Any) -> None:
    while not done():
        time.sleep(0.1)


def run(source: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "imaged", *words],
        cwd=source,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@contextmanager
def serving(source: Path, workers: int = 1, **settings: str) -> Iterator[httpx.Client]:
    """The version's own server on its own data folder, until it has ended by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    long = {f"IMAGED_{name}_S": LONG for name in ("RETENTION", "QUEUE", "HISTORY")}
    server = subprocess.Popen(
        [sys.executable, "-m", "imaged", "serve", "--port", str(port), "--workers", str(workers)],
        cwd=source,
        env={**os.environ, **long, "IMAGED_WEBHOOK_NETWORKS": "127.0.0.0/8", **settings},
    )
    ready = "readyz" if workers else "livez"
    try:
        until(lambda: server.poll() is not None or answers(f"http://127.0.0.1:{port}/{ready}"))
        key = (source / "data" / "first-key").read_text().strip()
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, headers={"x-api-key": key}, timeout=60) as client:
            yield client
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def pack(source: Path, told: dict[str, Any], file: Path) -> None:
    """One clean database file, and nobody's name on anything."""
    data = source / "data"
    database = sqlite.connect(data / "imaged.db")
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.execute("VACUUM")  # pages that were used before hold names of this machine
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    (source / "told.json").write_text(json.dumps(told, indent=1))

    def nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(file, "w:gz") as packed:
        for name in ("data", "told.json"):
            packed.add(source / name, name, filter=nobodys)
    print(f"{file.name}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    [_, commit] = sys.argv
    main(commit)
