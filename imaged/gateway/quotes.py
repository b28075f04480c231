"""Prices that are promised for a while. The quote's id is the promise itself, signed: nothing is
kept, and nobody can make one or change it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from imaged.catalogue import Model
from imaged.errors import BadParameter
from imaged.params import ImageParams

FIELD = "quote_id"
LIFE_S = 600.0
LONGEST = 250_000  # characters of an id
_MAC = 16  # bytes


@dataclass(frozen=True)
class Quote:
    """What one key may have made at this price until `until`, in seconds since 1970."""

    key_id: int
    model: str
    params: ImageParams
    cost_micros: int
    until: float

    def seal(self, secret: bytes) -> str:
        usual = ImageParams("").as_dict()
        asked = {n: v for n, v in self.params.as_dict().items() if v != usual[n]}
        facts = [self.key_id, self.model, asked, self.cost_micros, self.until]
        text = json.dumps(facts, separators=(",", ":"), ensure_ascii=False)
        body = zlib.compress(text.encode(), 9)
        return base64.urlsafe_b64encode(_mac(secret, body) + body).decode().rstrip("=")


def over() -> BadParameter:
    return BadParameter(FIELD, f"should be at most {LIFE_S:.0f} seconds old; ask for a new one")


def redeem(secret: bytes, sent: Mapping[str, Any], key_id: int, model: Model) -> Quote:
    """The quote that a body names, of any age. Raises BadParameter for what is no quote of this key
    and model, and for other parameters beside it than those that it was given for.
    """
    quote = _read(secret, sent[FIELD])
    if quote is None or (quote.key_id, quote.model) != (key_id, model.slug):
        raise BadParameter(FIELD, "should be one that preflight gave for this model and key")
    for knob in model.knobs:
        for name in (knob.name, *knob.aliases):
            if sent.get(name) is not None:
                value = replace(knob, name=name).read(sent[name])
                if value != getattr(quote.params, knob.name):
                    raise BadParameter(name, f"should be as in the {FIELD} that is sent with it")
    return quote


def _read(secret: bytes, text: object) -> Quote | None:
    if not isinstance(text, str) or not 0 < len(text) <= LONGEST:
        return None
    try:
        sealed = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    mac, body = sealed[:_MAC], sealed[_MAC:]
    if not hmac.compare_digest(mac, _mac(secret, body)):
        return None
    try:
        key_id, model, asked, cost_micros, until = json.loads(zlib.decompress(body))
        return Quote(key_id, model, ImageParams(**{"prompt": "", **asked}), cost_micros, until)
    except (TypeError, ValueError):  # of another version
        return None


def _mac(secret: bytes, body: bytes) -> bytes:
    return hmac.new(secret, b"quote:" + body, hashlib.sha256).digest()[:_MAC]
