"""Pixels to file content: JPEG, PNG, and the small JPEG of a preview."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imaged.params.image_params import ImageParams
from imaged.provenance.infotext import infotext

if TYPE_CHECKING:
    from imaged.engine.decode import Picture

JPEG_QUALITY = 95
PREVIEW_QUALITY = 80


def encode_jpeg(picture: Picture) -> bytes:
    """JPEG at quality 95 without chroma subsampling; the same pixels give the same bytes."""
    size = (picture.width, picture.height)
    return _saved(picture.rgb, size, "JPEG", quality=JPEG_QUALITY, subsampling=0)


@lru_cache(maxsize=64)  # asked for at every tick; the preview changes every few calls
def encode_preview(rgb: bytes, width: int, height: int) -> bytes:
    """A small picture's JPEG, at quality 80: a few kilobytes."""
    return _saved(rgb, (width, height), "JPEG", quality=PREVIEW_QUALITY)


def with_comment(jpeg: bytes, text: str) -> bytes:
    """The same JPEG with a comment after its first segment, which has to stay the first."""
    if not text:
        return jpeg
    content = text.encode()
    at = 4 + int.from_bytes(jpeg[4:6], "big")
    return jpeg[:at] + b"\xff\xfe" + (len(content) + 2).to_bytes(2, "big") + content + jpeg[at:]


def encode_png(picture: Picture, params: ImageParams, checkpoint: str, receipt: str = "") -> bytes:
    """PNG with the parameters in a text chunk, as A1111 writes them, and its receipt in another."""
    text = PngInfo()
    text.add_text("parameters", infotext(params, picture.seed, checkpoint))
    if receipt:
        text.add_text("receipt", receipt)
    return _saved(picture.rgb, (picture.width, picture.height), "PNG", pnginfo=text)


def _saved(rgb: bytes, size: tuple[int, int], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, rgb).save(buffer, kind, **options)
    return buffer.getvalue()
