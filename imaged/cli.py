"""The command line: serve, generate, keys, models, jobs; heavy imports inside each command."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imaged.catalogue import DEFAULT_SLUG, MICRO, MICROS, SLUG, STANDARD_PRICE, Model
from imaged.errors import CommandError, ImagedError
from imaged.params import KNOBS, ImageParams, Knob, read_params
from imaged.settings import Settings

if TYPE_CHECKING:

    from imaged.store.db import Database

FIRST_CREDITS_USD = 100.0


class Commands(click.Group):
    """Shows our errors as one line, without a traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except ImagedError as error:
            raise click.ClickException(error.detail) from error


def data_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--data", type=click.Path(path_type=Path, file_okay=False),
        help="Folder of the database, the pictures and the first key  [default: data]",
    )(command)  # fmt: skip


@click.group(cls=Commands)
@click.version_option(package_name="imaged")
def main() -> None:
    """imaged, the image daemon: text to image on your own machine, over an HTTP API.

    Begin with `imaged serve`, or make one picture without a server: `imaged generate "a red
    house by a blue lake"`.
    """
    logging.basicConfig(
        level=os.environ.get("IMAGED_LOG", "WARNING").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is ever fetched at run time


@contextmanager
def store(data: Path | None) -> Iterator[tuple[Settings, Database]]:
    """The store of the given or configured data folder, with its schema brought up to date."""
    from imaged.store.db import Database

    settings = Settings.from_env(os.environ, data=data)
    settings.data.mkdir(parents=True, exist_ok=True)
    db = Database(settings.database)
    db.migrate()
    try:
        yield settings, db
    finally:
        db.close()


# -- serve, worker ----------------------------------------------------------------------------


@main.command()
@click.option("--host", help="Address to listen on  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port  [default: 8000]")
@click.option("--workers", type=int, help="Worker processes; 0 for a gateway alone  [default: 1]")
@data_option
def serve(
    host: str | None, port: int | None, workers: int | None, data: Path | None
) -> None:
    """Run the API and its workers until Ctrl-C. Ready when GET /readyz answers 200.

    The first start makes an API key, prints it once and keeps it in DATA/first-key.
    """
    import uvicorn

    from imaged.gateway.app import build_app
    from imaged.worker.supervisor import Supervisor

    given = Settings.from_env(os.environ, host=host, port=port, workers=workers, data=data)
    with store(given.data) as (_, db):
        key = _first_key(given, db)
        _greet(given, key)
        supervisor = Supervisor(given, db)
        supervisor.start()
        try:
            uvicorn.run(
                build_app(given), host=given.host, port=given.port, log_level="warning",
                access_log=False, timeout_graceful_shutdown=5, server_header=False,
            )  # fmt: skip
        finally:
            supervisor.stop(grace_s=25)


@main.command()
@click.option("--id", "worker_id", help="Given by the supervisor; leave it out otherwise.")
@data_option
def worker(worker_id: str | None, data: Path | None) -> None:
    """Run one more worker on the same store (`serve` runs its own)."""
    from imaged.worker.main import main as run

    run(Settings.from_env(os.environ, data=data), worker_id)


def _first_key(settings: Settings, db: Database) -> str | None:
    """The key made at first start; None when keys were made by hand."""
    from imaged.store import keys

    path = settings.data / "first-key"
    secret = keys.load_secret(settings.data)
    with db.write() as connection:
        if keys.rows(connection):
            return path.read_text().strip() if path.exists() else None
        key = keys.create(connection, secret, time.time(), name="first",
                          credits_micros=int(FIRST_CREDITS_USD * MICROS))  # fmt: skip
        path.touch(mode=0o600)
        path.write_text(key + "\n")  # before the commit: a key that nobody knows is no use
        click.echo(f"New API key (kept in {path}): {key}\n")
        return key


def _greet(settings: Settings, key: str | None) -> None:
    url = settings.public_url or f"http://{settings.host}:{settings.port}"
    shown = f"$(cat {settings.data / 'first-key'})" if key else "YOUR_KEY"
    click.echo(
        f"imaged serves {DEFAULT_SLUG} at {url}   (Ctrl-C stops it)\n\n"
        "Try it, from a second terminal:\n\n"
        f'  curl {url}/v1/{DEFAULT_SLUG} -H "x-api-key: {shown}" \\\n'
        "    -H 'content-type: application/json' -o house.jpg \\\n"
        "    -d '{\"prompt\": \"a red house by a blue lake, snowed mountains, sunset\","
        ' "img_width": 512, "img_height": 512}\'\n'
    )


# -- generate ---------------------------------------------------------------------------------


def knob_option(knob: Knob) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command-line option from a knob; values are checked by the knob, as in the API."""
    names = {"negative_prompt": "negative", "num_inference_steps": "steps",
             "guidance_scale": "guidance", "img_width": "width", "img_height": "height"}
    shown = "" if knob.default is None else f", default {knob.default}"
    text = f"{knob.text.rstrip('.')} ({knob.allowed}{shown})."
    return click.option(f"--{names.get(knob.name, knob.name)}", knob.name, help=text)


def knob_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for knob in reversed(KNOBS):
        if knob.name not in ("prompt", "base64"):
            command = knob_option(knob)(command)
    return command


@main.command()
@click.argument("prompt")
@knob_options
@click.option("--model", default=DEFAULT_SLUG, show_default=True, help="Slug from `models list`.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False),
              help="File to write (.jpg or .png)  [default: imaged-SEED.jpg]")
@data_option
def generate(
    prompt: str, model: str, output: Path | None, data: Path | None, **given: Any
) -> None:
    """Make pictures in this process, without a server. Prints each file and its seed."""
    import secrets
    from dataclasses import replace

    params, _ = read_params({"prompt": prompt, **given})
    if params.seed < 0:
        params = replace(params, seed=secrets.randbelow(10**9))
    if output is not None and output.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise CommandError("--output should end in .jpg, .jpeg or .png")
    _generate(params, _model(model, data), output)


def _model(slug: str, data: Path | None) -> Model:
    """A model of the catalogue; the built-in ones need no data folder."""
    from imaged.catalogue import BUILT_IN
    from imaged.store import models

    settings = Settings.from_env(os.environ, data=data)
    offered = {m.slug: m for m in BUILT_IN}
    if (settings.data / "imaged.db").exists() or settings.database_url:
        with store(data) as (_, db), db.read() as connection:
            offered = models.catalogue(connection)
    if slug not in offered:
        raise CommandError(f"there is no model {slug}; there are: {', '.join(offered)}")
    return offered[slug]


def _generate(params: ImageParams, model: Model, output: Path | None) -> None:
    from tqdm import tqdm

    from imaged.engine.engine import Engine
    from imaged.engine.load import load
    from imaged.worker.deliver import encode_jpeg

    click.echo(f"checkpoint {model.checkpoint_name}", err=True)
    engine = Engine(load(model.checkpoint))
    engine.submit("cli", params)
    outcomes: list[Any] = []
    with tqdm(total=params.unet_calls * params.samples, unit="call", desc="denoising") as bar:
        while not outcomes:
            outcomes = engine.tick()
            done, total = engine.progress().get("cli", (bar.total, bar.total))
            bar.total = total
            bar.update(done - bar.n)
    outcome = outcomes[0]
    if outcome.error is not None:
        raise outcome.error
    for k, picture in enumerate(outcome.pictures):
        path = _output_path(output, picture.seed, k, len(outcome.pictures))
        if path.suffix.lower() == ".png":
            from PIL import Image

            size = (picture.width, picture.height)
            Image.frombytes("RGB", size, picture.rgb).save(path)
        else:
            path.write_bytes(encode_jpeg(picture))
        click.echo(f"{path}  seed {picture.seed}")


def _output_path(output: Path | None, seed: int, k: int, count: int) -> Path:
    if output is None:
        return Path(f"imaged-{seed}.jpg")
    return output if count == 1 else output.with_stem(f"{output.stem}-{k}")


# -- keys -------------------------------------------------------------------------------------


@main.group()
def keys() -> None:
    """API keys and their credits."""


@keys.command("create")
@click.option("--name", default="", help="For whom; shown in lists.")
@click.option("--credits", "credits_usd", type=click.FloatRange(0, 1e9), default=10.0,
              show_default=True, help="US dollars to begin with.")
@click.option("--rpm", type=click.IntRange(1, 1_000_000), default=600, show_default=True,
              help="Submits a minute.")
@data_option
def keys_create(name: str, credits_usd: float, rpm: int, data: Path | None) -> None:
    """Make a key and print it. It is shown this once."""
    from imaged.store import keys as table

    with store(data) as (settings, db), db.write() as connection:
        secret = table.load_secret(settings.data)
        key = table.create(connection, secret, time.time(), name=name, rpm=rpm,
                           credits_micros=round(credits_usd * MICROS))  # fmt: skip
    click.echo(key)


@keys.command("list")
@data_option
def keys_list(data: Path | None) -> None:
    """All keys, with what is left on each."""
    from imaged.store import keys as table

    with store(data) as (_, db), db.read() as connection:
        rows = table.rows(connection)
    click.echo(f"{'id':>4}  {'key':<12} {'name':<16} {'credits':>12} {'reserved':>12} {'rpm':>8}  state")
    for row in rows:
        state = "revoked" if row.revoked_at else "active"
        free = (row.balance_micros - row.reserved_micros) / MICROS
        click.echo(f"{row.id:>4}  {row.hint:<12} {row.name:<16} {free:>12.6f} "
                   f"{row.reserved_micros / MICROS:>12.6f} {row.rpm:>8}  {state}")


@keys.command("revoke")
@click.argument("key_id", type=int)
@data_option
def keys_revoke(key_id: int, data: Path | None) -> None:
    """Refuse a key from now on (its id is in `keys list`)."""
    from imaged.store import keys as table

    with store(data) as (_, db), db.write() as connection:
        table.revoke(connection, key_id, time.time())
    click.echo(f"key {key_id} is revoked")


@keys.command("top-up")
@click.argument("key_id", type=int)
@click.argument("credits_usd", type=click.FloatRange(0, 1e9, min_open=True))
@data_option
def keys_top_up(key_id: int, credits_usd: float, data: Path | None) -> None:
    """Give a key more credits, in US dollars."""
    from imaged.store import ledger

    with store(data) as (_, db), db.write() as connection:
        ledger.grant(connection, key_id, round(credits_usd * MICROS), time.time())
        free = ledger.free(connection, key_id)
    click.echo(f"key {key_id} has {free / MICROS:.6f} credits")


# -- models -----------------------------------------------------------------------------------


@main.group()
def models() -> None:
    """Which checkpoints are served, under which slug."""


@models.command("list")
@data_option
def models_list(data: Path | None) -> None:
    """All models on offer."""
    from imaged.store import models as table

    with store(data) as (_, db), db.read() as connection:
        offered = table.catalogue(connection)
    click.echo(f"{'slug':<28} {'checkpoint':<24} {'1024 px, 25 steps':>18}")
    for model in offered.values():
        click.echo(f"{model.slug:<28} {model.checkpoint_name:<24} "
                   f"{model.price_micros / MICROS:>14.6f} USD")


@models.command("show")
@click.argument("slug")
@data_option
def models_show(slug: str, data: Path | None) -> None:
    """One model and the parameters it takes."""
    model = _model(slug, data)
    click.echo(f"{model.slug}: {model.title}\ncheckpoint: {model.checkpoint_name} "
               f"({model.checkpoint})\nprice: {model.price_micros / MICROS:.6f} USD for 1024 x "
               "1024 at 25 UNet calls\n")
    if model.checkpoint == MICRO and model.slug != "micro":
        click.echo("No checkpoint was added under this slug: micro stands in for it.\n")
    for knob in KNOBS:
        click.echo(f"  {knob.name:<20} {knob.allowed}; default {knob.default}. {knob.text}")


@models.command("add")
@click.argument("slug")
@click.option("--checkpoint", required=True, type=click.Path(exists=True, path_type=Path),
              help="A diffusers folder, or one .safetensors file in the original SDXL layout.")
@click.option("--title", default=None, help="Shown in lists  [default: the slug]")
@click.option("--price", type=click.FloatRange(0, 1000, min_open=True),
              default=STANDARD_PRICE / MICROS, show_default=True,
              help="US dollars for one picture of 1024 x 1024 at 25 UNet calls.")
@data_option
def models_add(
    slug: str, checkpoint: Path, title: str | None, price: float, data: Path | None
) -> None:
    """Serve a checkpoint under a slug. It is loaded once now, to see that it can be."""
    from imaged.engine.load import load
    from imaged.store import models as table

    if not SLUG.fullmatch(slug):
        raise CommandError("a slug is lower-case letters, digits, '.', '_' and '-', at most 80")
    click.echo(f"checking {checkpoint.name} ...", err=True)
    load(checkpoint.resolve())
    model = Model(slug, title or slug, checkpoint.resolve(), max(1, round(price * MICROS)))
    with store(data) as (_, db), db.write() as connection:
        table.add(connection, model, time.time())
    click.echo(f"{slug} is served from {model.checkpoint_name}")


@models.command("remove")
@click.argument("slug")
@data_option
def models_remove(slug: str, data: Path | None) -> None:
    """Serve an added model no more; its files stay."""
    from imaged.store import models as table

    with store(data) as (_, db), db.write() as connection:
        table.remove(connection, slug)
    click.echo(f"{slug} is removed")


# -- jobs -------------------------------------------------------------------------------------


@main.group()
def jobs() -> None:
    """What is queued, running and done."""


@jobs.command("list")
@click.option("--limit", default=20, show_default=True)
@data_option
def jobs_list(limit: int, data: Path | None) -> None:
    """The newest jobs."""
    from imaged.store import queue

    with store(data) as (_, db), db.read() as connection:
        found = queue.newest(connection, limit)
    click.echo(f"{'id':<32}  {'state':<10} {'calls':>9} {'key':>4} {'submitted':<19}  model")
    for job in found:
        calls = f"{job.calls_done}/{job.params.unet_calls * job.params.samples}"
        at = datetime.fromtimestamp(job.created_at).strftime("%Y-%m-%d %H:%M:%S")
        click.echo(f"{job.id:<32}  {job.state:<10} {calls:>9} {job.key_id:>4} {at:<19}  {job.model}")


@jobs.command("show")
@click.argument("job_id")
@data_option
def jobs_show(job_id: str, data: Path | None) -> None:
    """Everything that is known of one job."""
    from dataclasses import asdict

    for name, value in asdict(_job(job_id, data)).items():
        click.echo(f"{name:<18} {value}")


@jobs.command("cancel")
@click.argument("job_id")
@data_option
def jobs_cancel(job_id: str, data: Path | None) -> None:
    """End a job that has not ended; it is not charged."""
    from imaged.store import queue

    _job(job_id, data)
    with store(data) as (settings, db), db.write() as connection:
        ended = queue.cancel(connection, job_id, time.time(), settings.retention_s)
    click.echo(f"{job_id} is cancelled" if ended else f"{job_id} had already ended")


def _job(job_id: str, data: Path | None) -> Any:
    from imaged.store import queue

    with store(data) as (_, db), db.read() as connection:
        job = queue.read(connection, [job_id]).get(job_id)
    if job is None:
        raise CommandError(f"there is no job {job_id}; see: imaged jobs list")
    return job
