"""imaged serve, imaged worker"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from imaged.catalogue import DEFAULT_SLUG, MICROS
from imaged.cli.app import data_option, main, store
from imaged.errors import CommandError
from imaged.settings import Settings

if TYPE_CHECKING:
    from imaged.store.db import Database

FIRST_CREDITS_USD = 100.0


@main.command()
@click.option("--host", help="Address to listen on  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(1, 65535), help="Port  [default: 8000]")
@click.option(
    "--workers",
    type=click.IntRange(0, 64),
    help="Worker processes; 0 for a gateway alone  [default: 1]",
)
@data_option
def serve(host: str | None, port: int | None, workers: int | None, data: Path | None) -> None:
    """Run the API and its workers until Ctrl-C. Ready when GET /readyz answers 200.

    The first start makes an API key and keeps it in DATA/first-key; in a terminal it is shown.
    """
    from imaged.gateway import listen
    from imaged.worker.check import load_check
    from imaged.worker.supervisor import Supervisor

    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn passes on what it was stopped by
        signal.signal(number, lambda *_: sys.exit(0))
    given = Settings.from_env(os.environ, host=host, port=port, workers=workers, data=data)
    if given.models_file is not None:  # in a process of its own, which takes torch with it
        sync = [sys.executable, "-m", "imaged", "models", "sync", "--data", str(given.data)]
        if subprocess.run(sync, check=False).returncode:
            raise CommandError(f"{given.models_file} cannot be served")
    with store(given.data) as (_, db):
        load_check(given.checker)  # before any worker: a wrong setting ends the start here
        server = listen.server(given)
        _greet(given, _first_key(given, db))
        supervisor = Supervisor(given, db)
        supervisor.start()
        try:
            server.run()
            if not server.started:
                raise CommandError("the gateway could not start")
        finally:
            supervisor.stop(grace_s=given.drain_s + 10)


@main.command()
@click.option("--id", "worker_id", help="Given by the supervisor; leave it out otherwise.")
@click.option("--parent", type=int, help="Likewise: the worker ends when this process is gone.")
@data_option
def worker(worker_id: str | None, parent: int | None, data: Path | None) -> None:
    """Run one more worker on the same store (`serve` runs its own)."""
    from imaged.worker.main import main as run

    run(Settings.from_env(os.environ, data=data), worker_id, parent)


def _first_key(settings: Settings, db: Database) -> str | None:
    """The key made at first start; None when keys were made by hand."""
    from imaged.store import keys

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
    url = settings.public_url or f"http://{settings.host}:{settings.port}"
    shown = f"$(cat {settings.data / 'first-key'})" if key else "YOUR_KEY"
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
