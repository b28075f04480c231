"""The two headers of a POST that say how its job is to be handled."""

from __future__ import annotations

import hashlib
import hmac
import json
import re

from starlette.datastructures import Headers

from imaged.errors import BadParameter
from imaged.jobs import NO_TERMS, Terms
from imaged.params import ImageParams

IDEMPOTENCY_KEY, CANCEL_AFTER = "Idempotency-Key", "Cancel-After"
LONGEST_CANCEL_S = 86_400
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


#: Fields that are always part of a fingerprint. Others came later, and where they say nothing a
#: request is what it was before there were any.
FIRST = frozenset(
    {
        *("prompt", "negative_prompt", "samples", "scheduler", "num_inference_steps", "seed"),
        *("guidance_scale", "img_width", "img_height", "base64", "output_format"),
    }
)


def read_terms(headers: Headers) -> Terms:
    """Both headers, each optional; raises BadParameter, which names the header."""
    return Terms(
        idempotency_key=_idempotency_key(headers.getlist(IDEMPOTENCY_KEY)),
        cancel_after_s=_cancel_after_s(headers.getlist(CANCEL_AFTER)),
    )


def fingerprint(secret: bytes, slug: str, params: ImageParams, terms: Terms = NO_TERMS) -> str:
    """What was asked, as a keyed hash: it tells nothing of the prompt to a reader of the store.

    `params` are those that were sent: a seed of -1 is part of the request, the drawn one is not.
    """
    usual = ImageParams("").as_dict()
    asked = {n: v for n, v in params.as_dict().items() if n in FIRST or v != usual[n]}
    if terms.draft_steps:
        asked["draft"] = terms.draft_steps
    if terms.made_in:
        asked["made_in"] = terms.made_in
    text = json.dumps([slug, asked], sort_keys=True)
    return hmac.new(secret, b"fingerprint:" + text.encode(), hashlib.sha256).hexdigest()


def _idempotency_key(given: list[str]) -> str | None:
    if not given:
        return None
    if len(given) > 1 or not _KEY.fullmatch(given[0]):
        raise BadParameter(
            IDEMPOTENCY_KEY, "should be given once, as 1 to 255 visible ASCII characters"
        )
    return given[0]


def _cancel_after_s(given: list[str]) -> float | None:
    if not given:
        return None
    seconds = float(given[0]) if len(given) == 1 and _SECONDS.fullmatch(given[0]) else 0.0
    if not 0 < seconds <= LONGEST_CANCEL_S:
        raise BadParameter(
            CANCEL_AFTER, f"should be given once, as seconds above 0 and up to {LONGEST_CANCEL_S}"
        )
    return seconds
