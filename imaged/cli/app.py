"""What all commands share: the group, the data folder, the store."""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imaged.catalogue import toml
from imaged.catalogue.model import Model
from imaged.errors import CommandError, ImagedError
from imaged.settings import Setting, Settings, known, shown

if TYPE_CHECKING:
    from imaged.store.sql.database import Database


class Commands(click.Group):
    """Shows our errors as one line, without a traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except ImagedError as error:
            raise click.ClickException(error.detail) from error
        except BrokenPipeError:  # click ends quietly when its reader has gone
            raise
        except (OSError, UnicodeError) as error:
            raise click.ClickException(str(error)) from error
        except Exception as error:
            from sqlalchemy.exc import SQLAlchemyError

            if not isinstance(error, SQLAlchemyError):
                raise
            reason = str(getattr(error, "orig", error)).splitlines()[0]
            raise click.ClickException(f"the database cannot be used: {reason}") from error


class Dollars(click.FloatRange):
    """US dollars; NaN, which no comparison refuses, is refused."""

    name = "dollars"

    def convert(self, value: Any, param: click.Parameter | None, context: Any) -> float:
        amount = float(super().convert(value, param, context))
        if math.isnan(amount):
            self.fail("NaN is not an amount", param, context)
        return amount


ROW_ID = click.IntRange(1, 2**63 - 1)


class _Value(click.ParamType[Any]):
    """The value of a setting."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.name = {int: "integer", float: "number", Path: "path"}.get(setting.kind, "text")

    def convert(self, value: Any, param: click.Parameter | None, context: Any) -> Any:
        try:
            return self._setting.read(str(value), "it")
        except CommandError as error:
            self.fail(error.detail, param, context)


def setting_option(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A setting as an option; None, and so the setting's own value, without it."""
    setting = known()[name]
    text = f"{setting.text.rstrip('.')}  [default: {shown(setting.default)}]"
    return click.option(f"--{name}", type=_Value(setting), help=text)


data_option = setting_option("data")


@click.group(cls=Commands)
@click.version_option(package_name="imaged")
def main() -> None:
    """imaged, the image daemon: text to image on your own machine, over an HTTP API.

    Begin with `imaged serve`, or make one picture without a server: `imaged generate "a red
    house by a blue lake"`. Every setting is a variable of the environment too: IMAGED_PORT,
    IMAGED_DATA and so on; an option goes before its variable.
    """
    level = os.environ.get("IMAGED_LOG", "WARNING").upper()
    if level not in logging.getLevelNamesMapping():
        raise CommandError("IMAGED_LOG should be DEBUG, INFO, WARNING, ERROR or CRITICAL")
    logging.basicConfig(
        level=level,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is ever fetched at run time


@contextmanager
def store(data: Path | None, *, new: bool = True) -> Iterator[tuple[Settings, Database]]:
    """Open the store of the data folder and bring its schema up to date.

    new: create it if there is none; else that raises CommandError.
    """
    from imaged.store.sql.database import Database

    settings = Settings.from_env(os.environ, data=data)
    if not new and not store_exists(settings):
        raise CommandError(
            f"nothing is kept in {settings.data}; --data or IMAGED_DATA says where it is"
        )
    make_folder(settings)
    db = Database(settings.database)
    db.migrate()
    try:
        yield settings, db
    finally:
        db.close()


def store_exists(settings: Settings) -> bool:
    """Whether there is a store already."""
    return bool(settings.database_url) or (settings.data / "imaged.db").exists()


def make_folder(settings: Settings) -> None:
    """Create the data folder if need be; raises CommandError if it cannot be written."""
    try:
        settings.data.mkdir(parents=True, exist_ok=True)
        if not settings.database_url:
            _try_to_write(settings.data)
    except OSError as error:
        raise CommandError(
            f"the data folder {settings.data} cannot be written: {error.strerror}; choose another "
            "with --data"
        ) from None


def make_files_folder(settings: Settings) -> None:
    """Create the folder of the pictures; raises CommandError if it cannot be written."""
    from imaged.store.blobs import Blobs

    folder = Path(settings.blobs.removeprefix("file://"))
    try:
        folder = Blobs(settings.blobs).folder
        for each in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            folder = each
            _try_to_write(folder)
    except OSError as error:
        raise CommandError(
            f"pictures cannot be kept in {folder}: {error.strerror}; is it another user's?"
        ) from None


def _try_to_write(folder: Path) -> None:
    """Raises OSError if no file can be created there; permissions alone do not tell."""
    with tempfile.TemporaryFile(dir=folder):
        pass


def refuse_unwritable(path: Path, option: str) -> None:
    """Raises CommandError now if a file could not be written there later.

    It is tried, because permissions alone do not tell; not with a pipe or a device, whose reader
    would notice.
    """
    real = Path(os.path.realpath(path))  # a link stays one
    try:
        if not path.parent.is_dir():
            raise CommandError(f"{option}: there is no folder {path.parent}")
        fresh = not real.exists()
        if fresh or real.is_file() or real.is_dir():
            with real.open("ab"):
                pass
        if fresh:
            real.unlink()
    except OSError as error:
        raise CommandError(f"{option}: {path} cannot be written: {error.strerror}") from None


def find_model(slug: str, data: Path | None) -> Model:
    """A model of the catalogue; the built-in ones need no data folder."""
    settings = Settings.from_env(os.environ, data=data)
    offered = dict(toml.built_in())
    if store_exists(settings):
        from imaged.store import catalogue

        with store(data) as (_, db), db.read() as connection:
            offered = catalogue.catalogue(connection)
    if slug not in offered:
        raise CommandError(f"there is no model {slug}; there are: {', '.join(offered)}")
    return offered[slug]
