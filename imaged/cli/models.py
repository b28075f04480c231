"""imaged models list, show, add, remove"""

from __future__ import annotations

import time
from pathlib import Path

import click

from imaged.catalogue import MICRO, MICROS, SLUG, STANDARD_PRICE, Model
from imaged.cli.app import Dollars, data_option, find_model, main, store
from imaged.errors import CommandError
from imaged.params import KNOBS


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
        click.echo(
            f"{model.slug:<28} {model.checkpoint_name:<24} {model.price_micros / MICROS:>14.6f} USD"
        )


@models.command("show")
@click.argument("slug")
@data_option
def models_show(slug: str, data: Path | None) -> None:
    """One model and the parameters it takes."""
    model = find_model(slug, data)
    click.echo(
        f"{model.slug}: {model.title}\ncheckpoint: {model.checkpoint_name} "
        f"({model.checkpoint})\nprice: {model.price_micros / MICROS:.6f} USD for 1024 x "
        "1024 at 25 UNet calls\n"
    )
    if model.checkpoint == MICRO and model.slug != "micro":
        click.echo("No checkpoint was added under this slug: micro stands in for it.\n")
    for knob in KNOBS:
        click.echo(f"  {knob.name:<20} {knob.allowed}; default {knob.default}. {knob.text}")


@models.command("add")
@click.argument("slug")
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="A diffusers folder, or one .safetensors file in the original SDXL layout.",
)
@click.option("--title", default=None, help="Shown in lists  [default: the slug]")
@click.option(
    "--price",
    type=Dollars(0, 1000, min_open=True),
    default=STANDARD_PRICE / MICROS,
    show_default=True,
    help="US dollars for one picture of 1024 x 1024 at 25 UNet calls.",
)
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
