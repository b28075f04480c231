"""A worker that is killed in the midst of a long job: what of it is made again."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import sqlalchemy as sa

from bench.app import Effort, effort_options, main
from bench.figures import Row, publish
from bench.rounds import Spread, compare
from imaged.catalogue.model import DEFAULT_SLUG, MICRO
from imaged.params.image_params import ImageParams
from imaged.store.sql.database import Database
from imaged.store.sql.schema import workers

SAVED_EACH_S = 2.0
ON = re.compile(r"goes on after (\d+) calls")


@main.command()
@effort_options()
def recovery(effort: Effort) -> None:
    """kill -9 in the midst of 100 steps, with jobs saved every two seconds and without.

    The worker is killed once 60 steps are told of, the supervisor starts another, and the job is
    done by that one; timed is the whole job, from its submit to its end. A row of its own tells how
    much was made again, in seconds of the job's own pace. Target: no more than the two seconds
    between savings, and the second that a worker's last word may be old.
    """
    import torch

    from bench.ceiling import ceilings
    from bench.sides.servers import imaged_server

    found = ceilings(torch.device("cpu"))
    again: list[float] = []
    with (
        tempfile.TemporaryDirectory() as one,
        tempfile.TemporaryDirectory() as other,
        imaged_server(
            MICRO, Path(one), effort.threads, IMAGED_PARK_S=str(SAVED_EACH_S), IMAGED_LOG="INFO"
        ) as saving,
        imaged_server(MICRO, Path(other), effort.threads, IMAGED_PARK_S="0") as plain,
    ):
        pair = compare(
            lambda n: _killed(saving.client, Path(one), n, again),
            lambda n: _killed(plain.client, Path(other), n, None),
            effort.rounds,
            "recovery",
        )
    rows = [
        Row.of("a job whose worker is killed", "s", "lower", "nothing saved", pair),
        Row("made again after the kill", "s", ours=Spread.of(again), limit=SAVED_EACH_S + 1.0),
    ]
    publish("recovery", effort, rows, found)


def _killed(client: Any, data: Path, n: int, again: list[float] | None) -> float:
    """Seconds of a job whose worker is killed once."""
    params = ImageParams("a lake", num_inference_steps=100, seed=n, img_width=512, img_height=512)
    began = time.perf_counter()
    job_id = client.post(f"/v2/{DEFAULT_SLUG}", json=params.as_dict()).json()["request_id"]
    status = f"/v2/requests/{job_id}/status"
    while (told := client.get(status).json()).get("step", 0) < 60:
        if told["status"] not in ("QUEUED", "PROCESSING"):
            raise click.ClickException(f"the job ended before it was killed: {told}")
        time.sleep(0.02)
    pace_s = (time.perf_counter() - began) / told["unet_calls_done"]
    os.kill(_worker(data), signal.SIGKILL)
    while client.get(status, params={"wait": 30}).json()["status"] != "COMPLETED":
        pass
    if again is not None:
        behind = int(ON.findall((data / "server.log").read_text())[-1])
        again.append((told["unet_calls_done"] - behind) * pace_s)
    return time.perf_counter() - began


def _worker(data: Path) -> int:
    """The pid of the one worker there is."""
    db = Database(f"sqlite:///{data / 'imaged.db'}")
    try:
        with db.read() as connection:
            asked = sa.select(workers.c.pid).order_by(workers.c.seen_at.desc()).limit(1)
            return int(connection.execute(asked).scalar_one())
    finally:
        db.close()
