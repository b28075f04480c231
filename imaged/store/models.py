"""The catalogue: the models that come with imaged and those that were added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from imaged import offers
from imaged.catalogue import MICROS, Model
from imaged.errors import CommandError
from imaged.store.schema import models


def catalogue(connection: sa.Connection) -> dict[str, Model]:
    """Slug -> model; an added model takes the place of a built-in one of the same slug."""
    added = {slug: offers.model(slug, table) for slug, table in tables(connection).items()}
    return {**offers.built_in(), **added}


def tables(connection: sa.Connection) -> dict[str, dict[str, Any]]:
    """Slug -> table of what was added, as models.toml has it."""
    rows = connection.execute(sa.select(models).order_by(models.c.slug))
    return {row.slug: row.entry or _plain(row) for row in rows}


def _plain(row: Any) -> dict[str, Any]:
    """Of a model that was added when there was no more to say."""
    price = row.price_micros / MICROS
    return {"title": row.title, "checkpoint": row.checkpoint, "price": price}


def add(connection: sa.Connection, slug: str, table: Mapping[str, Any], now: float) -> Model:
    """Offer a model; an earlier one of the same slug is replaced. Raises CommandError."""
    model = offers.model(slug, table)
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
        own = slug in offers.built_in()
        why = "it comes with imaged" if own else "see: imaged models list"
        raise CommandError(f"no model {slug} was added; {why}")
