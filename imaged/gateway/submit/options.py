"""Idempotency-Key and Cancel-After: request headers that say how a job is handled."""

from __future__ import annotations

import json
import re

from starlette.datastructures import Headers

from imaged.errors import BadParameter
from imaged.jobs import DEFAULT_OPTIONS, RequestOptions
from imaged.params.image_params import DEFAULTS, ImageParams
from imaged.store.signing import mac

IDEMPOTENCY_KEY, CANCEL_AFTER = "Idempotency-Key", "Cancel-After"
MAX_CANCEL_S = 86_400
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


#: Fields that are always part of a fingerprint. Later ones are only where they differ from their
#: default, so that fingerprints of older requests stay the same.
ALWAYS_HASHED = frozenset(
    {
        *("prompt", "negative_prompt", "samples", "scheduler", "num_inference_steps", "seed"),
        *("guidance_scale", "img_width", "img_height", "base64", "output_format"),
    }
)


def read_options(headers: Headers) -> RequestOptions:
    """Both headers, each optional; raises BadParameter, which names the header."""
    return RequestOptions(
        idempotency_key=_idempotency_key(headers.getlist(IDEMPOTENCY_KEY)),
        cancel_after_s=_cancel_after_s(headers.getlist(CANCEL_AFTER)),
    )


def fingerprint(
    secret: bytes, slug: str, params: ImageParams, options: RequestOptions = DEFAULT_OPTIONS
) -> str:
    """A keyed hash of the request, hex; a reader of the store learns nothing of the prompt.

    params: as sent, so a seed of -1 stays -1.
    """
    asked = {n: v for n, v in params.as_dict().items() if n in ALWAYS_HASHED or v != DEFAULTS[n]}
    if options.draft_steps:
        asked["draft"] = options.draft_steps
    if options.made_in:
        asked["made_in"] = options.made_in
    text = json.dumps([slug, asked], sort_keys=True)
    return mac(secret, b"fingerprint:" + text.encode()).hex()


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
    if not 0 < seconds <= MAX_CANCEL_S:
        raise BadParameter(
            CANCEL_AFTER, f"should be given once, as seconds above 0 and up to {MAX_CANCEL_S}"
        )
    return seconds
