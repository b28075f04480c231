"""Models on offer: built-in ones, and those that operators added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from imaged.catalogue import toml
from imaged.catalogue.model import MICROS, Model
from imaged.errors import CommandError
from imaged.store.sql.schema import models


def catalogue(connection: sa.Connection) -> dict[str, Model]:
    """Slug -> model; an added model takes the place of a built-in one of the same slug."""
    added = {slug: toml.model(slug, table) for slug, table in tables(connection).items()}
    return {**toml.built_in(), **added}


def tables(connection: sa.Connection) -> dict[str, dict[str, Any]]:
    """Slug -> table of an added model, in the form of models.toml."""
    rows = connection.execute(sa.select(models).order_by(models.c.slug))
    return {row.slug: row.entry or _plain(row) for row in rows}


def _plain(row: Any) -> dict[str, Any]:
    """The table of a model that was added by a version without the column `entry`."""
    price = row.price_micros / MICROS
    return {"title": row.title, "checkpoint": row.checkpoint, "price": price}


def add(connection: sa.Connection, slug: str, table: Mapping[str, Any], now: float) -> Model:
    """Offer a model; an earlier one of the same slug is replaced. Raises CommandError."""
    model = toml.model(slug, table)
    connection.execute(models.delete().where(models.c.slug == slug))
    connection.execute(
        models.insert().values(
            slug=slug,
            title=model.title,
            checkpoint=str(model.checkpoint),
            price_micros=model.price_micros,
            added_at=now,
            entry=dict(table),
        )
    )
    return model


def remove(connection: sa.Connection, slug: str) -> None:
    if not connection.execute(models.delete().where(models.c.slug == slug)).rowcount:
        own = slug in toml.built_in()
        why = "it comes with imaged" if own else "see: imaged models list"
        raise CommandError(f"no model {slug} was added; {why}")
