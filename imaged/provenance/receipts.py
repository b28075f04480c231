"""Receipts: request, provenance and pixels of one image, signed with Ed25519.

They name neither job nor time, so that equal images have equal receipts and equal files.
"""

from __future__ import annotations

import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from imaged.errors import ReceiptRefused
from imaged.params.image_params import ImageParams, plain

VERSION = 1
MAX_BYTES = 60_000  # in an image file; a JPEG comment holds 65,533
#: Parameters of delivery, which are not part of a receipt.
DELIVERY_FIELDS = frozenset({"samples", "base64", "prompt_report"})
#: Fields of a receipt beside key and signature, and their types.
FACTS: Mapping[str, type] = {
    "receipt": int,
    "model": str,
    "request": dict,
    "checkpoint": str,
    "checkpoint_sha256": str,
    "table_sha256": str,
    "loras": str,
    "engine": str,
    "device": str,
    "dtype": str,
    "determinism": str,
    "varied": bool,
    "picture": dict,
}
PIXELS: Mapping[str, type] = {"width": int, "height": int, "sha256": str}  # of `picture`
#: Fields that explain why two images of the same request differ.
CAUSES = ("checkpoint_sha256", "table_sha256", "loras", "engine", "device", "dtype", "determinism")


def request_of(params: ImageParams, seed: int) -> dict[str, Any]:
    """The request of this image alone, with every parameter that has a value."""
    values = {name: plain(getattr(params, name)) for name in params.as_dict()}
    said = {n: v for n, v in values.items() if n not in DELIVERY_FIELDS and v is not None}
    return {**said, "seed": seed}


def picture_of(rgb: bytes, width: int, height: int) -> dict[str, Any]:
    """Size and SHA-256 of the pixels; not of the file, which contains the receipt."""
    return {"width": width, "height": height, "sha256": hashlib.sha256(rgb).hexdigest()}


def sign(facts: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """A signed receipt of these facts."""
    said = {"receipt": VERSION, **facts}
    assert said.keys() == FACTS.keys()
    return {**said, "key": public(key), "signature": _text(key.sign(_bytes(said)))}


def public(key: Ed25519PrivateKey) -> str:
    """The public key in base64."""
    return _text(key.public_key().public_bytes_raw())


def read(receipt: object) -> dict[str, Any]:
    """Check a receipt's form and signature, under whatever key; raises ReceiptRefused."""
    if not isinstance(receipt, Mapping) or receipt.keys() != {*FACTS, "key", "signature"}:
        raise ReceiptRefused("it is no receipt")
    said = {name: receipt[name] for name in FACTS}
    if said["receipt"] != VERSION:
        raise ReceiptRefused("it is of another version")
    try:
        key = Ed25519PublicKey.from_public_bytes(_raw(receipt["key"]))
        key.verify(_raw(receipt["signature"]), _bytes(said))
        json.dumps(said, ensure_ascii=False).encode()  # an answer repeats it
    except (InvalidSignature, ValueError, TypeError, RecursionError) as error:
        raise ReceiptRefused("its signature is not of what it says") from error
    if any(not isinstance(said[name], kind) for name, kind in FACTS.items()):
        raise ReceiptRefused("it is no receipt")
    if {name: type(value) for name, value in said["picture"].items()} != PIXELS:
        raise ReceiptRefused("it does not say which pixels it is of")
    return dict(receipt)


def made_in(receipt: Mapping[str, Any]) -> str:
    """Device kind and dtypes of a receipt, which a replay asks for, as in "cpu float32"."""
    return f"{'cpu' if receipt['device'].startswith('CPU ') else 'cuda'} {receipt['dtype']}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The CAUSES in which two receipts differ."""
    return [
        {"field": name, "receipt": before[name], "now": now[name]}
        for name in CAUSES
        if before[name] != now[name]
    ]


def written(receipt: Mapping[str, Any]) -> str:
    """The receipt as text for an image file; empty if it is too long."""
    text = json.dumps(receipt, separators=(",", ":"))
    return text if len(text) <= MAX_BYTES else ""


def _bytes(said: Mapping[str, Any]) -> bytes:
    """The signed bytes: independent of the order of fields, and of whether whole numbers have a
    decimal point (Python) or none (JavaScript).
    """
    text = json.dumps(_whole(said), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def _whole(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _whole(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text(raw: bytes) -> str:
    return binascii.b2a_base64(raw, newline=False).decode()


def _raw(text: object) -> bytes:
    if not isinstance(text, str):
        raise TypeError
    return binascii.a2b_base64(text, strict_mode=True)  # its error is a ValueError
