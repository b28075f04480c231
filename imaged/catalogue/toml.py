"""Models as tables, in models.toml files and in the store."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from imaged.catalogue.model import (
    CPU_DTYPES,
    DTYPES,
    MICRO,
    MICROS,
    PREDICTIONS,
    SLUG,
    STANDARD_PRICE,
    Model,
    Weights,
)
from imaged.errors import BadParameter, CommandError
from imaged.params.image_params import read_params
from imaged.params.knobs import KNOBS, WIDEST, Knob

SHIPPED = Path(__file__).parent / "models.toml"
FIELDS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("title", "description", "licence", "checkpoint", "vae"), str),
    **dict.fromkeys(("dtype", "cpu_dtype", "prediction", "sha256"), str),
    "price": (int, float),
    "zero_snr": bool,
    "parameters": dict,
    "sample": dict,
}
OF_WEIGHTS = ("dtype", "cpu_dtype", "prediction", "zero_snr", "sha256")
WORDS = {"dtype": DTYPES, "cpu_dtype": CPU_DTYPES, "prediction": PREDICTIONS}
Table = Mapping[str, Any]


@cache
def built_in() -> Mapping[str, Model]:
    """The built-in models by slug."""
    return {slug: model(slug, table) for slug, table in tables(SHIPPED).items()}


def shipped(slug: str) -> Table:
    """The built-in table of a slug, whose fields are defaults for an added model."""
    return tables(SHIPPED).get(slug, {})


@cache
def tables(path: Path) -> Mapping[str, Table]:
    """Tables of one file by slug, with absolute paths; raises CommandError."""
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} cannot be read: {error}") from error
    found = content.get("model", {})
    if set(content) - {"model"} or not isinstance(found, dict):
        raise CommandError(f"{path} should hold tables [model.SLUG] only")
    for slug, table in found.items():
        if not isinstance(table, dict):
            raise CommandError(f"{path}: {slug} should be a table [model.{slug}]")
        for name in ("checkpoint", "vae"):
            if isinstance(table.get(name), str):
                table[name] = str((path.parent / table[name]).resolve())
    return found


def model(slug: str, table: Table) -> Model:
    """A model from its table; raises CommandError naming the field."""
    if not SLUG.fullmatch(slug):
        raise CommandError(
            f"{slug!r}: a slug is lower-case letters, digits, '.', '_' and '-', at most 80"
        )
    _check(slug, table)
    knobs = tuple(_knob(slug, knob, table.get("parameters", {})) for knob in KNOBS)
    price = table.get("price", STANDARD_PRICE / MICROS)
    found = Model(
        slug,
        table.get("title", slug),
        _weights(table),
        max(1, round(price * MICROS)),
        knobs,
        table.get("description", "").strip(),
        table.get("licence", ""),
        table.get("sample", {}),
    )
    try:
        strange = read_params(found.sample, knobs)[1] if found.sample else []
    except BadParameter as problem:
        raise CommandError(f"{slug}: the sample's {problem.detail}") from None
    if strange:
        raise CommandError(f"{slug}: the sample has {strange[0]}, which is no parameter")
    return found


def _check(slug: str, table: Table) -> None:
    unknown = sorted(set(table) - set(FIELDS))
    if unknown:
        raise CommandError(f"{slug}: there is no field {unknown[0]}; there are {', '.join(FIELDS)}")
    for name, value in table.items():
        if not isinstance(value, FIELDS[name]) or (isinstance(value, bool) and name != "zero_snr"):
            raise CommandError(f"{slug}: {name} is of the wrong type")
    for name, allowed in WORDS.items():
        if table.get(name, "") not in ("", *allowed):
            raise CommandError(f"{slug}: {name} should be one of {', '.join(allowed)}")
    if not 0 < table.get("price", 1) <= 1000:
        raise CommandError(f"{slug}: price should be between 0 and 1000 US dollars")
    strange = sorted(set(table.get("parameters", {})) - {knob.name for knob in KNOBS})
    if strange:
        raise CommandError(f"{slug}: there is no parameter {strange[0]}")


def _weights(table: Table) -> Weights:
    checkpoint, vae = table.get("checkpoint"), table.get("vae")
    said = {name: table[name] for name in OF_WEIGHTS if name in table}
    return Weights(Path(checkpoint) if checkpoint else MICRO, Path(vae) if vae else None, **said)


def _knob(slug: str, knob: Knob, parameters: Table) -> Knob:
    where = f"{slug}: {knob.name}"
    found = parameters.get(knob.name, {})
    return chosen(where, knob, found) if knob.kind == "choice" else ranged(where, knob, found)


def chosen(where: str, knob: Knob, table: Any) -> Knob:
    """A choice with fewer choices or another default; raises CommandError."""
    if not isinstance(table, dict) or set(table) - {"choices", "default"}:
        raise CommandError(f"{where} should be under choices and default")
    choices = table.get("choices", list(knob.choices))
    if not isinstance(choices, list) or not choices or set(choices) - set(knob.choices):
        raise CommandError(f"{where} should be {knob.allowed}")
    default = table.get("default", knob.default if knob.default in choices else choices[0])
    return _with_default(where, replace(knob, choices=tuple(choices)), default)


def ranged(where: str, knob: Knob, table: Any) -> Knob:
    """A parameter with other bounds or default; raises CommandError."""
    numeric = knob.name in WIDEST
    allowed = {"low", "high", "default"} if numeric else {"default"}
    if not isinstance(table, dict) or set(table) - allowed:
        words = "numbers under low, high and default" if numeric else "a table with default only"
        raise CommandError(f"{where} should be {words}")
    limits = {name: value for name, value in table.items() if name != "default"}
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in limits.values()):
        raise CommandError(f"{where} should be numbers under low, high and default")
    knob = replace(knob, **limits)
    if numeric:
        assert knob.low is not None and knob.high is not None
        low, high = WIDEST[knob.name]
        if not low <= knob.low <= knob.high <= high:
            raise CommandError(f"{where} should stay between {low} and {high}")
    default = table.get("default", knob.default)
    return knob if default is None else _with_default(where, knob, default)


def _with_default(where: str, knob: Knob, default: Any) -> Knob:
    try:
        return replace(knob, default=knob.read(default))
    except BadParameter as problem:
        raise CommandError(f"{where}: the default {problem.detail}") from None
