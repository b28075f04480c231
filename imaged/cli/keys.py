"""imaged keys create, list, revoke, top-up"""

from __future__ import annotations

import time
from pathlib import Path

import click

from imaged.catalogue.model import MICROS
from imaged.cli.app import ROW_ID, Dollars, data_option, main, store


@main.group()
def keys() -> None:
    """API keys and their credits."""


@keys.command("create")
@click.option("--name", default="", help="For whom; shown in lists.")
@click.option(
    "--credits",
    "credits_usd",
    type=Dollars(0, 1e9),
    default=10.0,
    show_default=True,
    help="US dollars to begin with.",
)
@click.option(
    "--rpm",
    type=click.IntRange(1, 1_000_000),
    default=600,
    show_default=True,
    help="Submits a minute.",
)
@click.option("--model", "models", multiple=True, help="May use this slug only; may be repeated.")
@data_option
def keys_create(
    name: str, credits_usd: float, rpm: int, models: tuple[str, ...], data: Path | None
) -> None:
    """Make a key and print it. It is shown this once."""
    from imaged.store.accounts import keys as table

    with store(data) as (settings, db), db.write() as connection:
        secret = table.load_secret(settings.data)
        key = table.create(
            connection,
            secret,
            time.time(),
            name=name,
            rpm=rpm,
            credits_micros=round(credits_usd * MICROS),
            models=models,
        )
    click.echo(key)


@keys.command("list")
@data_option
def keys_list(data: Path | None) -> None:
    """All keys, with what is left on each."""
    from imaged.store.accounts import keys as table

    with store(data, new=False) as (_, db), db.read() as connection:
        rows = table.rows(connection)
    click.echo(
        f"{'id':>4}  {'key':<12} {'name':<16} {'credits':>12} {'reserved':>12} {'rpm':>8}  state"
    )
    for row in rows:
        state = "revoked" if row.revoked_at else "active"
        if row.models:
            state += f", for {', '.join(row.models)} only"
        free = (row.balance_micros - row.reserved_micros) / MICROS
        click.echo(
            f"{row.id:>4}  {row.hint:<12} {row.name:<16} {free:>12.6f} "
            f"{row.reserved_micros / MICROS:>12.6f} {row.rpm:>8}  {state}"
        )


@keys.command("revoke")
@click.argument("key_id", type=ROW_ID)
@data_option
def keys_revoke(key_id: int, data: Path | None) -> None:
    """Refuse a key from now on (its id is in `keys list`)."""
    from imaged.store.accounts import keys as table

    with store(data, new=False) as (_, db), db.write() as connection:
        table.revoke(connection, key_id, time.time())
    click.echo(f"key {key_id} is revoked")


@keys.command("top-up")
@click.argument("key_id", type=ROW_ID)
@click.argument("credits_usd", type=Dollars(0, 1e9, min_open=True))
@data_option
def keys_top_up(key_id: int, credits_usd: float, data: Path | None) -> None:
    """Give a key more credits, in US dollars."""
    from imaged.store.accounts import ledger

    with store(data, new=False) as (_, db), db.write() as connection:
        ledger.grant(connection, key_id, round(credits_usd * MICROS), time.time())
        free = ledger.free(connection, key_id)
    click.echo(f"key {key_id} has {free / MICROS:.6f} credits")
