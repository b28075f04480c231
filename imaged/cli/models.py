"""imaged models list, show, add, sync, remove"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from imaged.catalogue import toml
from imaged.catalogue.model import (
    DTYPES,
    MICRO,
    MICROS,
    PREDICTIONS,
    STANDARD_PRICE,
    Model,
    ModelState,
)
from imaged.cli.app import Dollars, data_option, find_model, main, make_folder, store, store_exists
from imaged.errors import CommandError
from imaged.settings import Settings

#: Fields about a model's files: they stay as added where a models.toml names no checkpoint.
FILE_FIELDS = ("checkpoint", "vae", "dtype", "cpu_dtype", "prediction", "zero_snr")
DTYPE_TEXTS = {"fp32": "fp32", "bf16": "bf16, the VAE fp32"}


@main.group()
def models() -> None:
    """Which checkpoints are served, under which slug."""


@models.command("list")
@data_option
def models_list(data: Path | None) -> None:
    """All models on offer. `state` tells whether a worker holds a checkpoint at this moment."""
    from imaged.store import catalogue as table
    from imaged.store.jobs import model_demand

    offered, states = dict(toml.built_in()), dict[str, ModelState]()
    if store_exists(Settings.from_env(os.environ, data=data)):
        with store(data) as (settings, db), db.read() as connection:
            offered = table.catalogue(connection)
            states = model_demand.states(connection, time.time() - settings.lease_s)
    click.echo(f"{'slug':<28} {'state':<12} {'checkpoint':<24} {'1024 px, 25 steps':>18}")
    for model in offered.values():
        click.echo(
            f"{model.slug:<28} {states.get(model.slug, ModelState.UNLOADED):<12} "
            f"{model.checkpoint_name:<24} {model.price_micros / MICROS:>14.6f} USD"
        )


@models.command("show")
@click.argument("slug")
@data_option
def models_show(slug: str, data: Path | None) -> None:
    """One model and the parameters it takes."""
    model = find_model(slug, data)
    click.echo(
        f"{model.slug}: {model.title}\n"
        f"checkpoint: {model.checkpoint_name} ({model.checkpoint})\n{_details(model)}"
        f"price: {model.price_micros / MICROS:.6f} USD for 1024 x 1024 at 25 UNet calls\n"
    )
    if model.checkpoint == MICRO and model.slug != "micro":
        click.echo("No checkpoint was added under this slug: micro stands in for it.\n")
    for knob in model.knobs:
        click.echo(f"  {knob.name:<20} {knob.allowed}; default {knob.default}. {knob.text}")


def _details(model: Model) -> str:
    """What was set for the model when it was added, one setting a line."""
    weights = model.weights
    lines = {
        "description": model.description,
        "SHA-256": weights.sha256,
        "VAE": weights.vae,
        "dtype": weights.dtype,
        "dtype on a CPU": "" if weights.dtype else DTYPE_TEXTS.get(weights.cpu_dtype),
        "prediction": weights.prediction,
        "zero terminal SNR": {None: "", True: "yes", False: "no"}[weights.zero_snr],
        "licence": model.licence,
    }
    return "".join(f"{name}: {value}\n" for name, value in lines.items() if value)


@models.command("add")
@click.argument("slug")
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="A diffusers folder, or one safetensors file in the original SDXL layout.",
)
@click.option(
    "--vae",
    type=click.Path(exists=True, path_type=Path),
    help="A VAE in place of the checkpoint's own: a safetensors file, or a diffusers folder.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Type of the weights in memory; with fp16 the VAE stays fp32  [default: fp32 on a CPU, or "
    "bf16 and the VAE fp32 where it has bf16 and the UNet is large; on a GPU bf16, or fp16]",
)
@click.option(
    "--prediction",
    type=click.Choice(PREDICTIONS),
    help="What the UNet predicts  [default: what the files say]",
)
@click.option(
    "--zero-snr/--no-zero-snr",
    default=None,
    help="Whether the training's noise ended in noise alone  [default: what the files say]",
)
@click.option("--title", help="Shown in lists  [default: the slug]")
@click.option("--description", help="What its pictures are like.")
@click.option("--licence", help="A note on its licence.")
@click.option(
    "--price",
    type=Dollars(0, 1000, min_open=True),
    help="US dollars for one picture of 1024 x 1024 at 25 UNet calls  "
    f"[default: {STANDARD_PRICE / MICROS}]",
)
@data_option
def models_add(
    slug: str, checkpoint: Path, vae: Path | None, data: Path | None, **said: Any
) -> None:
    """Serve a checkpoint under a slug.

    It is loaded once now, to see that it can be, and its SHA-256 is kept: if the files are others
    later, the model is not served. Ranges, defaults and a sample request are for a models.toml.
    """
    from imaged.store import catalogue as table
    from imaged.store.jobs import load_failures

    paths = {"checkpoint": checkpoint, "vae": vae}
    given = {name: str(path.resolve()) for name, path in paths.items() if path is not None}
    given |= {name: value for name, value in said.items() if value is not None}
    make_folder(Settings.from_env(os.environ, data=data))  # before what takes long
    entry = _loaded_once(slug, _with_cpu_dtype(slug, {**toml.shipped(slug), **given}))
    with store(data) as (_, db), db.write() as connection:
        model = table.add(connection, slug, entry, time.time())
        load_failures.clear(connection, model.weights)
    click.echo(f"{slug} is served from {model.checkpoint_name}")


@models.command("sync")
@click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False
)
@data_option
def models_sync(file: Path | None, data: Path | None) -> None:
    """Serve what a models.toml says  [default: DATA/models.toml].

    What is new or was changed in it is loaded once, as `add` does. What was added otherwise stays.
    `imaged serve` does this at its start.
    """
    from imaged.store import catalogue as table

    with store(data) as (settings, db):
        path = file or settings.models_file
        if path is None:
            raise CommandError(f"there is no {settings.data / 'models.toml'}")
        with db.read() as connection:
            known = table.tables(connection)
        for slug, said in toml.tables(path.resolve()).items():
            before = dict(known.get(slug, {}))
            stays = () if "checkpoint" in said else FILE_FIELDS
            kept = {name: before[name] for name in stays if name in before}
            entry = {**toml.shipped(slug), **kept, **said}
            digest, wanted = before.pop("sha256", ""), entry.pop("sha256", "")
            same = slug in known and _file_fields(before) == _file_fields(entry)
            same = same and wanted in ("", digest)
            if same and "cpu_dtype" in before:
                entry.setdefault("cpu_dtype", before["cpu_dtype"])
            if before == entry and digest and wanted in ("", digest):
                click.echo(f"{slug} is as it was")
                continue
            if not same:
                entry = _with_cpu_dtype(slug, entry)
            entry = _loaded_once(slug, {**entry, "sha256": wanted})
            with db.write() as connection:
                table.add(connection, slug, entry, time.time())
            click.echo(f"{slug} is served from {entry.get('checkpoint', 'micro')}")


def _file_fields(entry: Mapping[str, Any]) -> list[Any]:
    """Fields about the files that an operator sets; the CPU's dtype is chosen when they load."""
    return [entry.get(name) for name in FILE_FIELDS if name != "cpu_dtype"]


def _with_cpu_dtype(slug: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The table with a dtype for CPUs, if none is set and this machine would use one.

    It is stored, so that every machine makes the same pictures from then on. The built-in micro
    stays in float32.
    """
    from imaged.engine.cpu import Cpu, cpu_dtype
    from imaged.engine.loading.load import best_device, numbers

    weights = toml.model(slug, entry).weights
    said = weights.dtype or weights.cpu_dtype
    if said or weights.checkpoint == MICRO or best_device().type != "cpu":
        return dict(entry)
    dtype, reason = cpu_dtype(numbers(weights)["unet"], Cpu.here())
    other = " (--dtype fp32 for float32)" if dtype == "bf16" else " (--dtype bf16 for all in bf16)"
    click.echo(f"in {DTYPE_TEXTS[dtype]}: {reason}{other}", err=True)
    return {**entry, "cpu_dtype": dtype}


def _loaded_once(slug: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Load the model as a check; returns its table with the files' SHA-256.

    Raises CommandError or CheckpointRefused.
    """
    from imaged.engine.loading.load import load

    weights = toml.model(slug, entry).weights
    click.echo(f"checking {weights.checkpoint.name} ...", err=True)
    began = time.monotonic()
    nets = load(weights, show=sys.stderr.isatty())
    seconds, size = time.monotonic() - began, nets.file_bytes / 1e9
    click.echo(
        f"loaded {size:.3g} GB in {seconds:.1f} s ({size / seconds:.3g} GB/s) onto "
        f"{nets.device}; SHA-256 {nets.sha256}",
        err=True,
    )
    return {**entry, "sha256": nets.sha256}


@models.command("remove")
@click.argument("slug")
@data_option
def models_remove(slug: str, data: Path | None) -> None:
    """Serve an added model no more; its files stay."""
    from imaged.store import catalogue as table

    with store(data, new=False) as (_, db), db.write() as connection:
        table.remove(connection, slug)
    click.echo(f"{slug} is removed")
