"""A real gateway on a real store and a real socket, with a worker that paints at once.

The pictures are one grey square: what is tested here is what the API says about jobs, in every
state, and those states can be asked for in the prompt: "fail: TEXT", "hold", "run".
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from imaged.engine.decode import Picture
from imaged.engine.outcome import Outcome
from imaged.engine.snapshot import Provenance
from imaged.errors import JobFailed
from imaged.gateway import serve
from imaged.gateway.operations.maintenance import _chores_once
from imaged.settings import Settings
from imaged.store.accounts import keys
from imaged.store.blobs import Blobs
from imaged.store.jobs import model_demand, queue
from imaged.store.sql.database import Database
from imaged.worker.deliver import Delivery, Stamp
from tests.conftest import SLUG, free_port, store, until

PAINTER = "painter"


class Gate:
    """One running gateway; `database` and `settings` are its own, for what tests must arrange."""

    def __init__(self, data: Path, **settings: Any) -> None:
        self.settings = Settings(data=data, port=free_port(), lease_s=1e6, **settings)
        self.database = store(data / "imaged.db")
        self.secret = keys.load_secret(data)
        self.key = self.make_key(name="first", credits=1000.0, rpm=100_000)
        self.slug = SLUG
        self.url = f"http://127.0.0.1:{self.settings.port}"
        self._blobs = Blobs(self.settings.blobs)
        self._ending = threading.Event()

    def make_key(self, *, credits: float = 100.0, name: str = "", **more: Any) -> str:
        with self.database.write() as c:
            return keys.create(
                c, self.secret, time.time(), name=name, credits_micros=int(credits * 1e6), **more
            )

    def client(self, key: str | None = None) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"x-api-key": key or self.key}, timeout=60)

    def submit(self, prompt: str = "a house", **params: Any) -> str:
        with self.client() as client:
            answer = client.post(f"/v2/{SLUG}", json={"prompt": prompt, **params})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    def wait_for_end(self, job_id: str, key: str | None = None) -> httpx.Response:
        """The answer of the status endpoint once the job has ended."""
        with self.client(key) as client:
            return client.get(f"/v2/requests/{job_id}/status", params={"wait": 20})

    def expire_everything(self) -> None:
        """An hour later, as far as the gateway's chores can tell."""
        from sqlalchemy import update

        from imaged.store.sql.schema import jobs

        with self.database.write() as c:
            c.execute(update(jobs).where(jobs.c.expires_at.is_not(None)).values(expires_at=1.0))
        gateway: Any = _Chores(self.settings, self.database, self._blobs)
        _chores_once(gateway)

    @contextmanager
    def running(self) -> Iterator[Gate]:
        server = serve.server(self.settings)
        self.limiter = server.config.http.limiter  # type: ignore[union-attr]
        threads = [threading.Thread(target=server.run), threading.Thread(target=self._paint)]
        for thread in threads:
            thread.start()
        try:
            self._wait_until_up()
            yield self
        finally:
            self._ending.set()
            server.should_exit = True
            for thread in threads:
                thread.join()
            self.database.close()

    def _wait_until_up(self) -> None:
        def answers() -> bool:
            with suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/livez", timeout=60).is_success
            return False

        until(answers)

    def _paint(self) -> None:
        with self.database.write() as c:
            queue.register(c, PAINTER, 1, "here", time.time())
            queue.beat(c, PAINTER, time.time(), time.time(), "grey", {})
        while not self._ending.wait(0.02):
            with self.database.read() as c:
                if not model_demand.fairest(c, [SLUG, "micro"], time.time()):
                    continue
            with self.database.write() as c:
                held = "hold"
                taken = queue.claim(c, PAINTER, [SLUG, "micro"], 10, time.time())
                for job in [j for j in taken if j.params.prompt == held]:
                    _give_back(c, job.id)
            for job in taken:
                if job.params.prompt not in ("run", held):
                    self._deliver(job)

    def _deliver(self, job: Any) -> None:
        word, _, reason = job.params.prompt.partition(": ")
        if word == "fail":
            Delivery(self.database, self._blobs, PAINTER, self.settings).fail(
                job, JobFailed("job_failed", reason)
            )
            return
        size = (job.params.img_width, job.params.img_height)
        pictures = [
            Picture(b"\x7f" * (3 * size[0] * size[1]), *size, job.params.seed + k)
            for k in (job.draft and job.draft.samples) or range(job.params.samples)
        ]
        rests = job.draft is not None and not job.draft.samples
        states = (b"a state",) * len(pictures) if rests else ()
        provenance = Provenance("grey", "0" * 64, "1" * 64, "", "CPU", "float32", "exact")
        outcome = Outcome(job.id, tuple(pictures), None, 0.25, states, job.unet_calls, provenance)
        stamp = Stamp("grey", "exact", "CPU")
        Delivery(self.database, self._blobs, PAINTER, self.settings).deliver(job, outcome, stamp)


class _Chores:
    """As much of a gateway as its chores need."""

    def __init__(self, settings: Settings, db: Database, blobs: Blobs) -> None:
        self.settings, self.db, self.blobs = settings, db, blobs


def _give_back(connection: Any, job_id: str) -> None:
    from sqlalchemy import update

    from imaged.store.sql.schema import jobs

    connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id)
        .values(state="QUEUED", worker_id=None, model="held-by-a-test")
    )
