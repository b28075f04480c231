"""What only this installation can write: HMAC-SHA256 under its secret (`keys.load_secret`)."""

from __future__ import annotations

import hashlib
import hmac


def mac(secret: bytes, message: bytes) -> bytes:
    """32 bytes. A message begins with its purpose (file:, quote:, fingerprint:, webhook:), so that
    none passes for one of another kind; hashes of API keys, which begin with SG_, have none.
    """
    return hmac.new(secret, message, hashlib.sha256).digest()


def same(one: bytes, other: bytes) -> bool:
    """Whether two are equal; how long that takes says nothing of where they differ."""
    return hmac.compare_digest(one, other)
