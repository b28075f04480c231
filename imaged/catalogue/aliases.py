"""Aliases: other slugs for models, with their own bounds, as clients of the original API
know them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from imaged.catalogue.model import SLUG
from imaged.catalogue.toml import ranged
from imaged.errors import CommandError
from imaged.params.knobs import KNOBS, WIDEST, Knob

SHIPPED = Path(__file__).parent / "aliases.toml"


@dataclass(frozen=True)
class Aliases:
    """ranges: alias -> slug that is served, and its parameters; retired: slug -> text of
    the 410.
    """

    ranges: Mapping[str, tuple[str, tuple[Knob, ...]]]
    retired: Mapping[str, str]


def load(own: Path | None) -> Aliases:
    """The built-in aliases, overridden by the operator's file; raises CommandError."""
    ranges: dict[str, tuple[str, tuple[Knob, ...]]] = {}
    retired: dict[str, str] = {}
    for path in (SHIPPED, own):
        if path is None:
            continue
        tables = _tables(path)
        for slug, table in tables.get("alias", {}).items():
            ranges[_slug(path, slug)] = _alias(path, slug, table)
        for slug, text in tables.get("retired", {}).items():
            retired[_slug(path, slug)] = str(text)
    return Aliases(ranges, retired)


@cache
def widened(knobs: tuple[Knob, ...] = KNOBS) -> tuple[Knob, ...]:
    """Parameters with the engine's widest bounds, where the operator has set none."""
    return tuple(
        replace(knob, low=WIDEST[knob.name][0], high=WIDEST[knob.name][1])
        if knob.name in WIDEST and (knob.low, knob.high) == (usual.low, usual.high)
        else knob
        for knob, usual in zip(knobs, KNOBS, strict=True)
    )


def merge_knobs(knobs: tuple[Knob, ...], alias: tuple[Knob, ...]) -> tuple[Knob, ...]:
    """Merge parameters: alias over default, the operator's over both."""
    return tuple(
        other if knob == usual else knob
        for knob, other, usual in zip(knobs, alias, KNOBS, strict=True)
    )


def _tables(path: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} cannot be read: {error}") from error
    unknown = set(tables) - {"alias", "retired"}
    if unknown or not all(isinstance(table, dict) for table in tables.values()):
        raise CommandError(f"{path} should hold the tables [alias.SLUG] and [retired] only")
    return tables


def _slug(path: Path, slug: str) -> str:
    if not SLUG.fullmatch(slug):
        raise CommandError(f"{path}: a slug is lower-case letters, digits, '.', '_' and '-'")
    return slug


def _alias(path: Path, slug: str, table: Any) -> tuple[str, tuple[Knob, ...]]:
    if not isinstance(table, dict) or not isinstance(table.get("model"), str):
        raise CommandError(f'{path}: [alias.{slug}] should name its model = "..."')
    unknown = set(table) - set(WIDEST) - {"model"}
    if unknown:
        raise CommandError(f"{path}: [alias.{slug}] may set {', '.join(WIDEST)} and no other")
    where = f"{path}: [alias.{slug}]"
    knobs = tuple(
        ranged(f"{where}: {knob.name}", knob, table[knob.name]) if knob.name in table else knob
        for knob in KNOBS
    )
    return table["model"], knobs
