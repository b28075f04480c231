"""The catalogue: the built-in models and those that were added."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from imaged.catalogue import BUILT_IN, Model
from imaged.errors import CommandError
from imaged.store.schema import models


def catalogue(connection: sa.Connection) -> dict[str, Model]:
    """Slug -> model; an added model takes the place of a built-in one of the same slug."""
    offered = {model.slug: model for model in BUILT_IN}
    for row in connection.execute(sa.select(models).order_by(models.c.slug)):
        offered[row.slug] = Model(row.slug, row.title, Path(row.checkpoint), row.price_micros)
    return offered


def add(connection: sa.Connection, model: Model, now: float) -> None:
    """Offer a model; an earlier one of the same slug is replaced."""
    connection.execute(models.delete().where(models.c.slug == model.slug))
    connection.execute(
        models.insert().values(
            slug=model.slug,
            title=model.title,
            checkpoint=str(model.checkpoint),
            price_micros=model.price_micros,
            added_at=now,
        )
    )


def remove(connection: sa.Connection, slug: str) -> None:
    if not connection.execute(models.delete().where(models.c.slug == slug)).rowcount:
        raise CommandError(f"no model {slug} was added; see: imaged models list")
