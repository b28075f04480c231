"""imaged serve, imaged worker"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from imaged.catalogue.model import DEFAULT_SLUG, MICROS
from imaged.cli.app import data_option, main, make_files_folder, make_folder, setting_option, store
from imaged.errors import CommandError
from imaged.settings import Settings

if TYPE_CHECKING:
    from imaged.store.sql.database import Database

log = logging.getLogger(__name__)

FIRST_CREDITS_USD = 100.0


@main.command()
@setting_option("host")
@setting_option("port")
@setting_option("workers")
@data_option
def serve(host: str | None, port: int | None, workers: int | None, data: Path | None) -> None:
    """Run the API and its workers until Ctrl-C. Ready when GET /readyz answers 200.

    The first start makes an API key and keeps it in DATA/first-key; in a terminal it is shown.
    """
    from imaged.gateway import serve
    from imaged.worker.image_checker import load_check
    from imaged.worker.supervisor import Supervisor

    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn passes on what it was stopped by
        signal.signal(number, lambda *_: sys.exit(0))
    given = Settings.from_env(os.environ, host=host, port=port, workers=workers, data=data)
    sockets = serve.bind(given.host, given.port)  # before anything is said or made
    make_folder(given)
    with _locked(given):
        make_files_folder(given)
        _sync(given)
        with store(given.data) as (_, db):
            load_check(given.checker)  # before any worker: a wrong setting ends the start here
            server = serve.server(given)
            _greet(given, _first_key(given, db))
            supervisor = Supervisor(given, db)
            supervisor.start()
            try:
                server.run(sockets)
                if not server.started:
                    raise CommandError("the gateway could not start")
            finally:
                click.echo(
                    f"stopping: what is under way has {given.drain_s:.0f} s to end, then it is "
                    "saved for the next start; Ctrl-C again leaves at once",
                    err=True,
                )
                supervisor.stop(grace_s=given.leave_s)


@main.command()
@click.option("--id", "worker_id", help="Given by the supervisor; leave it out otherwise.")
@click.option("--parent", type=int, help="Likewise: the worker ends when this process is gone.")
@data_option
def worker(worker_id: str | None, parent: int | None, data: Path | None) -> None:
    """Run one more worker on the same store (`serve` runs its own)."""
    from imaged.worker.main import main as run

    run(Settings.from_env(os.environ, data=data), worker_id, parent)


@contextmanager
def _locked(settings: Settings) -> Iterator[None]:
    """Hold the data folder's lock: two servers on one embedded store would each run its chores
    and its workers. The system drops it when this process ends, however that is; workers and
    other commands neither hold nor need it.
    """
    if settings.database_url:  # a store that is made for several
        yield
        return
    try:
        file = (settings.data / "lock").open("a+", errors="replace")
    except OSError as error:
        raise CommandError(f"{settings.data / 'lock'} cannot be opened: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process = f" (process {pid})" if (pid := file.read(20).strip()) else ""
            raise CommandError(
                f"another server{process} serves the data folder {settings.data}: stop it, or "
                "choose another folder with --data"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked: %s", settings.data, error.strerror)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _sync(settings: Settings) -> None:
    """Run `models sync` in a process of its own, so that this one does not import torch."""
    if settings.models_file is None:
        return
    sync = [sys.executable, "-m", "imaged", "models", "sync", "--data", str(settings.data)]
    if subprocess.run(sync, check=False).returncode:
        raise CommandError(f"{settings.models_file} cannot be served")


def _first_key(settings: Settings, db: Database) -> str | None:
    """The key made at first start; None when keys were made by hand."""
    from imaged.store.accounts import keys

    path = settings.data / "first-key"
    secret = keys.load_secret(settings.data)
    with db.write() as connection:
        if any(row.name == "first" for row in keys.rows(connection)):
            return path.read_text().strip() if path.exists() else None
        key = keys.create(
            connection,
            secret,
            time.time(),
            name="first",
            credits_micros=int(FIRST_CREDITS_USD * MICROS),
        )
        path.touch(mode=0o600)
        path.write_text(key + "\n")  # before the commit: a key that nobody knows is no use
        if sys.stdout.isatty():  # elsewhere what is printed is a log
            click.echo(f"New API key (kept in {path}): {key}\n")
        return key


def _greet(settings: Settings, key: str | None) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = settings.public_url or f"http://{host}:{settings.port}"
    shown = f"$(cat {settings.data / 'first-key'})" if key else "YOUR_KEY"
    if not settings.workers:
        click.echo("No worker here: jobs wait until `imaged worker` runs on the same store.\n")
    click.echo(
        f"imaged serves {DEFAULT_SLUG} at {url}   (Ctrl-C stops it)\n"
        + (f"API key: in {settings.data / 'first-key'}\n" if key else "")
        + "\n"
        "Try it, from a second terminal:\n\n"
        f'  curl {url}/v1/{DEFAULT_SLUG} -H "x-api-key: {shown}" \\\n'
        "    -H 'content-type: application/json' -o house.jpg \\\n"
        '    -d \'{"prompt": "a red house by a blue lake, snowed mountains, sunset",'
        ' "img_width": 512, "img_height": 512}\'\n'
    )
