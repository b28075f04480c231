"""Killed workers, killed everything, orderly stops: no job lost, no double charge.

The tests share a server, which is started again when one has ended it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from imaged.catalogue.model import MICRO
from imaged.store.accounts import ledger
from imaged.store.blobs import Blobs
from imaged.store.sql.database import Database
from imaged.store.sql.schema import jobs, loads, workers
from tests.conftest import QUICK, SLUG, Server, cli, until

LONG: dict[str, Any] = {"num_inference_steps": 50, "seed": 9}
LEAST = {"img_width": 512, "img_height": 512, "num_inference_steps": 20}  # of models as added


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environ = {"IMAGED_PARK_S": "0.05", "IMAGED_DRAIN_S": "2", "IMAGED_LOG": "INFO"}
    server = Server(tmp_path_factory.mktemp("faults") / "data", environ=environ)
    yield server
    if server.running:
        server.stop()


@pytest.fixture
def own(harmed: Server) -> Server:
    """A server that the test may harm."""
    if not harmed.running:
        harmed.start()
    harmed.wait_until("readyz")
    return harmed


def wait_for_calls(server: Server, job_id: str) -> None:
    """Until the job is in the middle of its work: something of it has been saved."""
    blobs = Blobs(f"file://{server.data / 'files'}")
    until(lambda: blobs.snapshots_of(job_id))


@contextmanager
def store_of(server: Server) -> Iterator[Database]:
    """The store of a server, running or not."""
    db = Database(f"sqlite:///{server.data / 'imaged.db'}")
    yield db
    db.close()


def books(server: Server) -> list[str]:
    """What does not add up in the store of a server."""
    with store_of(server) as db, db.read() as c:
        assert c.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        wrong = ledger.audit(c)
        ends = c.exec_driver_sql(
            "SELECT job_id, group_concat(kind) FROM ledger WHERE job_id IS NOT NULL GROUP BY job_id"
        ).all()
    allowed = {"reserve", "reserve,settle", "reserve,release"}
    return wrong + [str(end) for end in ends if end[1] not in allowed]


def interrupted(server: Server, number: signal.Signals) -> tuple[dict[str, Any], int]:
    """The end of a job whose worker got a signal in its midst, and that worker's pid."""
    job_id = server.submit(**LONG)
    wait_for_calls(server, job_id)
    [pid] = server.worker_pids()
    os.kill(pid, number)
    status = server.wait(job_id)
    assert status["status"] == "COMPLETED"
    return status, pid


def test_killed_worker_costs_nothing(own: Server) -> None:
    status, pid = interrupted(own, signal.SIGKILL)
    job_id = status["request_id"]
    log = (own.data.parent / "data.log").read_text()
    assert 0 < int(re.findall(rf"{job_id} goes on after (\d+) calls", log)[-1]) <= 50
    assert status["metrics"]["retry_count"] == 1
    assert own.worker_pids() != [pid]
    first = fetch(own, job_id)
    again = own.submit(**LONG)
    own.wait(again)
    assert fetch(own, again) == first  # the same seed after the restart: the same picture
    assert books(own) == []


@pytest.mark.slow
def test_killed_everything_loses_nothing(own: Server) -> None:
    done = own.submit(seed=1)
    own.wait(done)
    before = fetch(own, done)
    running, waiting = own.submit(**LONG), own.submit(seed=3)
    wait_for_calls(own, running)
    own.kill_everything()
    own.start()
    for job_id in (running, waiting):
        assert own.wait(job_id)["status"] == "COMPLETED"
    assert fetch(own, done) == before
    assert books(own) == []


def fetch(server: Server, job_id: str) -> bytes:
    with server.client() as client:
        url = client.get(f"/v2/requests/{job_id}").json()["output"]
    answer = httpx.get(url)
    assert answer.status_code == 200
    return answer.content


@pytest.mark.slow
def test_orderly_stop_gives_jobs_back(own: Server) -> None:
    job_ids = [own.submit(num_inference_steps=100, samples=4) for _ in range(2)]
    wait_for_calls(own, job_ids[0])
    own.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
    assert own.process.wait(60) == 0  # type: ignore[union-attr]
    with store_of(own) as db, db.read() as c:
        asked = sa.select(jobs.c.state, jobs.c.attempts).where(jobs.c.id.in_(job_ids))
        left = c.execute(asked).all()
    assert {state for state, _ in left} <= {"QUEUED", "COMPLETED"}
    assert all(attempts == 0 for state, attempts in left if state == "QUEUED")
    assert books(own) == []
    own.start()
    with own.client() as client:  # what is left of them would keep the next test waiting
        for job_id in job_ids:
            assert client.delete(f"/v2/requests/{job_id}").is_success


def loading(db: Database, weights: str) -> list[int]:
    """The pids of workers that load these weights."""
    on = workers.c.id == loads.c.worker_id
    asked = sa.select(workers.c.pid).join_from(loads, workers, on)
    with db.read() as c:
        return list(c.execute(asked.where(loads.c.weights.contains(weights))).scalars())


@contextmanager
def deaths_of(server: Server, weights: str) -> Iterator[list[int]]:
    """End every worker that begins to load these weights; who that was."""
    ended, dead = threading.Event(), list[int]()

    def watch() -> None:
        with store_of(server) as db:
            while not ended.wait(0.002):
                for pid in loading(db, weights):
                    if pid not in dead:
                        os.kill(pid, signal.SIGKILL)
                        dead.append(pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield dead
    finally:
        ended.set()
        thread.join()


def silence(server: Server, slug: str, file: str) -> None:
    """A model of which one file is on a disk that does not answer: who reads it waits for ever."""
    folder = server.data / slug
    shutil.copytree(MICRO, folder)
    options = ("--checkpoint", str(folder), "--data", str(server.data))
    assert cli("models", "add", slug, *options).exit_code == 0
    (folder / file).unlink()
    os.mkfifo(folder / file)


@pytest.mark.slow
def test_a_checkpoint_that_ends_its_workers_becomes_unavailable(own: Server) -> None:
    """And who does not ask for it is served."""
    silence(own, "deadly", "unet/config.json")

    def ask() -> str:
        return own.submit("deadly", **LEAST)

    with deaths_of(own, "deadly") as dead:
        first = ask()
        beside = own.submit(num_inference_steps=20)
        assert "worker stopped" in own.wait(first)["error"]
        assert own.wait(beside)["status"] == "COMPLETED"
        assert len(dead) == 3
        assert "could not be loaded" in own.wait(ask())["error"]
        until(lambda: own.states()["deadly"] == "UNAVAILABLE")
        assert own.states()[SLUG] != "UNAVAILABLE"
        assert own.wait(own.submit())["status"] == "COMPLETED"
        assert len(dead) == 3
    assert books(own) == []


@pytest.mark.slow
def test_worker_ends_when_its_supervisor_is_killed(own: Server) -> None:
    kill_supervisor(own)


def kill_supervisor(server: Server) -> None:
    """And wait until its worker has ended."""
    [pid] = server.worker_pids()
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    until(lambda: not Path(f"/proc/{pid}").exists())


def state(server: Server, job_id: str) -> str:
    with server.client() as client:
        return str(client.get(f"/v2/requests/{job_id}/status").json()["status"])


@pytest.mark.slow
@pytest.mark.parametrize("file", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_hangs_ends_too(tmp_path: Path, file: str, end: signal.Signals) -> None:
    """Its supervisor was killed, or it is its own and told to stop: in the thread that loads, and
    in the loop, which looks how large a checkpoint is. Its job is made by the next.
    """
    alone = end is signal.SIGTERM
    environ = {
        "IMAGED_DRAIN_S": "1",
        "IMAGED_LEASE_S": "3",
        "IMAGED_WORKERS": "0" if alone else "1",
    }
    server = Server(tmp_path / "data", environ=environ).start(ready=not alone)
    command = [sys.executable, "-m", "imaged", "worker", "--data", str(server.data)]
    own = subprocess.Popen(command, env={**os.environ, **environ}) if alone else None
    try:
        server.wait_until("readyz")
        silence(server, "silent", file)
        job_id = server.submit("silent", **LEAST)
        until(lambda: state(server, job_id) == "PROCESSING")
        if own is not None:
            own.terminate()
            own.wait(120)
        else:
            kill_supervisor(server)
            server.environ["IMAGED_WORKERS"] = "0"
            server.start(ready=False)
        until(lambda: state(server, job_id) == "QUEUED")
        assert books(server) == []
    finally:
        if own is not None:
            own.kill()
            own.wait()
        server.kill_everything()


@pytest.mark.slow
def test_results_expire(tmp_path: Path) -> None:
    server = Server(tmp_path / "data", environ={"IMAGED_RETENTION_S": "3"}).start()
    try:
        job_id = server.submit()
        server.wait(job_id)
        with server.client() as client:
            url = client.get(f"/v2/requests/{job_id}").json()["output"]
            status = f"/v2/requests/{job_id}/status"
            until(lambda: client.get(status).status_code == 404)
            assert client.get(status).json()["error"] == f"Request {job_id} not found"
        assert httpx.get(url).status_code == 404
        until(lambda: not list((server.data / "files").glob("*/*")))
        assert books(server) == []
    finally:
        server.stop()


@pytest.mark.slow
def test_stopped_worker_process_is_replaced(tmp_path: Path) -> None:
    """SIGSTOP is a hang: seen from outside, ended, and its job is made by another."""
    environ = {"IMAGED_LEASE_S": "3", "IMAGED_PARK_S": "0.05"}
    server = Server(tmp_path / "data", environ=environ).start()
    try:
        _, pid = interrupted(server, signal.SIGSTOP)
        assert not Path(f"/proc/{pid}").exists() or pid not in server.worker_pids()
        assert books(server) == []
    finally:
        server.stop()


def test_gateway_without_workers_is_not_ready_but_takes_jobs(tmp_path: Path) -> None:
    server = Server(tmp_path / "data", environ={"IMAGED_WORKERS": "0"}).start(ready=False)
    try:
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        assert httpx.get(f"{server.url}/livez").status_code == 200
        with server.client() as client:
            assert client.post(f"/v2/{SLUG}", json=QUICK).status_code == 200
    finally:
        assert server.stop() == 0
