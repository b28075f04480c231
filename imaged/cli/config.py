"""imaged config"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import click

from imaged.cli.app import data_option, main
from imaged.errors import CommandError
from imaged.settings import Setting, Settings, known, setting_of, shown

INTRODUCTION = """# Settings

Each is a variable of the environment. `imaged serve` has options for some, which go before their
variables; `imaged config` shows the values in use and where they come from. A variable that begins
with `IMAGED_` and is none of these is refused before anything is done, as is a value that is not
allowed. What Kubernetes adds by itself for a service named imaged is ignored with a warning.
`IMAGED_URL` and `IMAGED_API_KEY` are the client's; `IMAGED_LOG` is the level of the log: DEBUG,
INFO, WARNING, ERROR or CRITICAL. Names that end in `_s` are seconds.

`imaged config --markdown` makes this page.

| variable | default | allowed | what it is |
|---|---|---|---|"""


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
@click.option("--markdown", is_flag=True, help="All settings and their defaults, as a document.")
@data_option
def config(names: tuple[str, ...], as_json: bool, markdown: bool, data: Path | None) -> None:
    """Show the settings in use, and where each value comes from.

    \b
      imaged config port workers

    Passwords in addresses are not shown.
    """
    if markdown:
        click.echo("\n".join([INTRODUCTION, *map(_row, known().values())]))
        return
    values = vars(Settings.from_env(os.environ, data=data))
    origins = _origins(os.environ, data)
    chosen = [_named(name) for name in names] or list(known().values())
    if as_json:
        told = {s.name: {"value": shown(values[s.name]), "from": origins[s.name]} for s in chosen}
        click.echo(json.dumps(told, ensure_ascii=False, indent=1))
        return
    for setting in chosen:
        value, origin = shown(values[setting.name]), origins[setting.name]
        changed = origin != "default"
        click.secho(f"{setting.variable:<32}{value or '(empty)':<24} {origin}", bold=changed)
        click.echo(f"  {setting.text} {setting.allowed.capitalize()}.")


def _named(name: str) -> Setting:
    """A setting by its name or its variable; raises CommandError."""
    found = known().get(name.lower().removeprefix("imaged_"))
    if found is None:
        raise CommandError(f"there is no setting {name}; there are: {', '.join(known())}")
    return found


def _origins(environ: Mapping[str, str], data: Path | None) -> Mapping[str, str]:
    """Where the value of each setting comes from."""

    def one(setting: Setting) -> str:
        if setting.name == "data" and data is not None:
            return "--data"
        text = environ.get(setting.variable)
        taken = text is not None and setting_of(setting.variable, text) is not None
        return "environment" if taken else "default"

    return {setting.name: one(setting) for setting in known().values()}


def _row(setting: Setting) -> str:
    default = f"`{shown(setting.default)}`" if shown(setting.default) else "empty"
    return f"| `{setting.variable}` | {default} | {setting.allowed} | {setting.text} |"
