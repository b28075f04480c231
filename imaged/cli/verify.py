"""imaged verify"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imaged.cli.app import data_option, find_model, main
from imaged.errors import CommandError, ReceiptRefused
from imaged.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

    from imaged.engine.decode import Picture


BROKEN = (OSError, SyntaxError, ValueError)  # what Pillow raises for a file that is not whole


@main.command()
@click.argument("picture", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--model", help="Make it with this model, not with the one that it names.")
@click.option("--key", help="The public key that should have signed it  [default: this server's].")
@click.option("--no-replay", is_flag=True, help="Only read it; make nothing.")
@data_option
def verify(
    picture: Path, model: str | None, key: str | None, no_replay: bool, data: Path | None
) -> None:
    """Check a picture by its receipt.

    The receipt is read, the picture made again, and the two are compared. A PNG without a receipt
    is made again from its parameters, if it has them. Exit status 1 where anything does not agree.
    """
    settings = Settings.from_env(os.environ, data=data)
    image, receipt, fields = _open(picture)
    agree = True
    if receipt:
        agree = _signature(receipt, key, settings)
        for name in ("engine", "device", "dtype", "determinism", "checkpoint", "checkpoint_sha256"):
            click.echo(f"{name.replace('_', ' '):18}{_shown(receipt[name])}")
    else:
        click.echo("receipt           none; its parameters are taken as they stand, unsigned")
    click.echo(f"{'request':18}{_shown(json.dumps(fields, ensure_ascii=False))}")
    if not no_replay:
        if receipt and receipt["varied"]:
            raise CommandError("its request changed on its way: it cannot be made again from this")
        slug = model or (receipt["model"] if receipt else None)
        agree = _replay(image, receipt, fields, slug, settings) and agree
    if not agree:
        raise SystemExit(1)


def _open(path: Path) -> tuple[Image, dict[str, Any], dict[str, Any]]:
    """The picture, its receipt, or {} without one, and the request that made it."""
    from PIL import Image, UnidentifiedImageError

    from imaged.provenance import receipts
    from imaged.provenance.infotext import read_infotext

    try:
        with Image.open(path) as opened:
            opened.load()
            info, image = dict(opened.info), opened.convert("RGB")
            image.info = {"format": opened.format}
    except (UnidentifiedImageError, Image.DecompressionBombError, *BROKEN) as error:
        raise CommandError(f"{path} is not a picture") from error
    text = info.get("receipt") or info.get("comment") or ""
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    if text.startswith('{"receipt"'):
        try:
            receipt = receipts.read(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise ReceiptRefused("its receipt is not whole") from error
        return image, receipt, receipt["request"]
    if "parameters" not in info:
        raise CommandError(f"{path} has neither a receipt nor parameters in it")
    return image, {}, read_infotext(info["parameters"])


def _signature(receipt: Mapping[str, Any], key: str | None, settings: Settings) -> bool:
    """Print who signed the receipt; False if it is not the expected key."""
    from imaged.provenance import receipts
    from imaged.store.accounts import keys

    if key is None and (settings.data / "receipt-key").exists():
        key = receipts.public(keys.load_signer(settings.data))
    whose = "this key" if key == receipt["key"] else f"another key, {_shown(receipt['key'])}"
    if key is None:
        whose = f"a key that is not known here, {_shown(receipt['key'])}"
    click.echo(f"receipt           signed by {whose}")
    return key in (None, receipt["key"])


def _replay(
    image: Image,
    receipt: Mapping[str, Any],
    fields: Mapping[str, Any],
    slug: str | None,
    settings: Settings,
) -> bool:
    """Make the picture again, print what differs; whether nothing does."""
    from imaged.catalogue.aliases import widened
    from imaged.catalogue.model import DEFAULT_SLUG
    from imaged.cli.generate import open_engine, run
    from imaged.engine.loading.load import best_device, with_dtypes
    from imaged.params.image_params import ImageParams, read_params
    from imaged.provenance import receipts
    from imaged.worker.deliver import Stamp, facts_of

    model = find_model(slug or DEFAULT_SLUG, settings.data)
    if receipt:
        weights = with_dtypes(model.weights, receipts.made_in(receipt), best_device())
        model = replace(model, weights=weights)
    usual = {k: v for k, v in receipts.request_of(ImageParams(""), -1).items() if k != "prompt"}
    params, _ = read_params({**usual, **fields, "samples": 1}, widened(model.knobs))
    if params.seed < 0:
        raise CommandError("its request has no seed")
    engine = open_engine(model, settings)
    outcome = run(engine, params)
    [made] = outcome.pictures
    apart = _apart(image, made)
    click.echo(f"{'file':18}{_levels(apart)}")
    if not receipt:
        return apart == 0
    assert outcome.provenance is not None
    stamp = Stamp(model.checkpoint_name, receipt["determinism"], engine.device)
    now = facts_of(params, model.slug, made, outcome.provenance, stamp)
    same = receipt["picture"] == now["picture"]
    click.echo(f"{'replay':18}{'identical' if same else 'different'}")
    for found in receipts.differences(receipt, now):
        then, after = (_shown(str(found[name])) for name in ("receipt", "now"))
        click.echo(f"  {found['field']}: {then} then, {after} now")
    return same and apart == 0


def _apart(image: Image, made: Picture) -> int | None:
    """The largest difference in levels of 255 between a file and the picture made again, as a
    file of the same kind; None if they are not of one size.
    """
    import io

    from PIL import Image, ImageChops

    from imaged.worker.encode import encode_jpeg

    if image.size != (made.width, made.height):
        return None
    again = Image.frombytes("RGB", image.size, made.rgb)
    if image.info["format"] == "JPEG":
        with Image.open(io.BytesIO(encode_jpeg(made))) as opened:
            again = opened.convert("RGB")
    return max(ImageChops.difference(image, again).tobytes())


def _shown(text: str) -> str:
    """Text from a file, escaped where it could imitate our own output."""
    return text if text.isprintable() else json.dumps(text)


def _levels(apart: int | None) -> str:
    if apart is None:
        return "is of another size than the picture made again"
    if apart:
        return f"differs from the picture made again by up to {apart} of 255 levels"
    return "has the pixels of the picture made again"
