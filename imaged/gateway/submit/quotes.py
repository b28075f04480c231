"""Quotes: prices that are promised for ten minutes. The id of a quote is its content, signed;
nothing is stored.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from imaged.catalogue.model import Model
from imaged.errors import BadParameter
from imaged.params.image_params import DEFAULTS, ImageParams
from imaged.store.signing import mac, same

QUOTE_ID = "quote_id"
LIFE_S = 600.0
MAX_ID_LENGTH = 250_000  # characters of an id
_SEAL = 16  # bytes


@dataclass(frozen=True)
class Quote:
    """One key's price for one request until `until`, seconds since 1970."""

    key_id: int
    model: str
    params: ImageParams
    cost_micros: int
    until: float

    def seal(self, secret: bytes) -> str:
        asked = {n: v for n, v in self.params.as_dict().items() if v != DEFAULTS[n]}
        facts = [self.key_id, self.model, asked, self.cost_micros, self.until]
        text = json.dumps(facts, separators=(",", ":"), ensure_ascii=False)
        body = zlib.compress(text.encode(), 9)
        return base64.urlsafe_b64encode(_seal(secret, body) + body).decode().rstrip("=")


def expired() -> BadParameter:
    return BadParameter(QUOTE_ID, f"should be at most {LIFE_S:.0f} seconds old; ask for a new one")


def redeem(secret: bytes, sent: Mapping[str, Any], key_id: int, model: Model) -> Quote:
    """The quote that a body names, expired or not. Raises BadParameter if it is not of this key and
    model, or if the body has other parameters than the quote.
    """
    quote = _read(secret, sent[QUOTE_ID])
    if quote is None or (quote.key_id, quote.model) != (key_id, model.slug):
        raise BadParameter(QUOTE_ID, "should be one that preflight gave for this model and key")
    for knob in model.knobs:
        for name in (knob.name, *knob.aliases):
            if sent.get(name) is not None:
                value = replace(knob, name=name).read(sent[name])
                if value != getattr(quote.params, knob.name):
                    raise BadParameter(name, f"should be as in the {QUOTE_ID} that is sent with it")
    return quote


def _read(secret: bytes, text: object) -> Quote | None:
    if not isinstance(text, str) or not 0 < len(text) <= MAX_ID_LENGTH:
        return None
    try:
        sealed = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    seal, body = sealed[:_SEAL], sealed[_SEAL:]
    if not same(seal, _seal(secret, body)):
        return None
    try:
        key_id, model, asked, cost_micros, until = json.loads(zlib.decompress(body))
        return Quote(key_id, model, ImageParams(**{"prompt": "", **asked}), cost_micros, until)
    except (TypeError, ValueError):  # of another version
        return None


def _seal(secret: bytes, body: bytes) -> bytes:
    return mac(secret, b"quote:" + body)[:_SEAL]
