"""imaged jobs list, show, cancel"""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import click

from imaged.cli.app import data_option, main, store
from imaged.errors import CommandError
from imaged.jobs import Job


@main.group()
def jobs() -> None:
    """What is queued, running and done."""


@jobs.command("list")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True)
@data_option
def jobs_list(limit: int, data: Path | None) -> None:
    """The newest jobs."""
    from imaged.store.jobs import queue

    with store(data, new=False) as (_, db), db.read() as connection:
        found = queue.newest(connection, limit)
    click.echo(f"{'id':<32}  {'state':<10} {'calls':>9} {'key':>4} {'submitted':<19}  model")
    for job in found:
        calls = f"{job.calls_done}/{job.unet_calls}"
        at = datetime.fromtimestamp(job.created_at).strftime("%Y-%m-%d %H:%M:%S")
        click.echo(
            f"{job.id:<32}  {job.state:<10} {calls:>9} {job.key_id:>4} {at:<19}  {job.model}"
        )


@jobs.command("show")
@click.argument("job_id")
@data_option
def jobs_show(job_id: str, data: Path | None) -> None:
    """Everything that is known of one job."""
    for name, value in asdict(_job(job_id, data)).items():
        click.echo(f"{name:<18} {value}")


@jobs.command("cancel")
@click.argument("job_id")
@data_option
def jobs_cancel(job_id: str, data: Path | None) -> None:
    """End a job that has not ended. Only a draft that was shown is charged."""
    from imaged.store.jobs import queue

    _job(job_id, data)
    with store(data, new=False) as (settings, db), db.write() as connection:
        ended = queue.cancel(connection, job_id, time.time(), settings.retention_s)
    click.echo(f"{job_id} is cancelled" if ended else f"{job_id} had already ended")


def _job(job_id: str, data: Path | None) -> Job:
    from imaged.store.jobs import queue

    with store(data, new=False) as (_, db), db.read() as connection:
        job = queue.read(connection, [job_id]).get(job_id)
    if job is None:
        raise CommandError(f"there is no job {job_id}; see: imaged jobs list")
    return job
