"""API keys: shown once, stored as keyed hashes; and the installation's own secrets."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from imaged.errors import CommandError
from imaged.store.accounts import ledger
from imaged.store.signing import mac
from imaged.store.sql.schema import api_keys

DEFAULT_RPM = 600
SECRET_BYTES = 32


@dataclass(frozen=True)
class Key:
    """An authenticated key; without the key's text."""

    id: int
    name: str
    models: frozenset[str] | None = None  # the slugs it may use; None: all


@dataclass(frozen=True)
class KeyRow:
    """One line of `imaged keys list`."""

    id: int
    name: str
    hint: str
    balance_micros: int
    reserved_micros: int
    rpm: int
    created_at: float
    revoked_at: float | None
    models: list[str] | None  # the slugs it may use; None: all


def load_secret(data: Path) -> bytes:
    """The installation's secret, created at first use in a file beside the database."""
    return _secret(data / "secret", "every key and every link invalid")


def load_signer(data: Path) -> Ed25519PrivateKey:
    """The Ed25519 key that signs receipts, stored likewise."""
    seed = _secret(data / "receipt-key", "every receipt one of another installation")
    return Ed25519PrivateKey.from_private_bytes(seed)


def _secret(path: Path, consequence: str) -> bytes:
    """Read or create a secret; consequence: what a new one would break, for the error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as f:
            f.write(secrets.token_bytes(SECRET_BYTES))
            f.flush()
            os.fsync(f.fileno())
        with contextlib.suppress(FileExistsError):  # another process was first: its secret is used
            os.link(part, path)
        part.unlink()
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise CommandError(
            f"{path} should hold {SECRET_BYTES} bytes and holds {len(secret)}: restore it from a "
            f"backup; a new one would make {consequence}"
        )
    return secret


def hash_key(secret: bytes, key: str) -> str:
    """Keyed hash: a copy of the database alone does not allow guessing keys."""
    return mac(secret, key.encode("utf-8", "replace")).hex()


def create(
    connection: sa.Connection,
    secret: bytes,
    now: float,
    *,
    name: str,
    credits_micros: int,
    rpm: int = DEFAULT_RPM,
    models: Collection[str] = (),
) -> str:
    """Create a key with credits; returns its text, which is not stored.

    models: slugs that it may use; empty: all.
    """
    key = "SG_" + secrets.token_hex(16)
    made = connection.execute(
        api_keys.insert().values(
            name=name,
            hash=hash_key(secret, key),
            hint=f"{key[:5]}…{key[-4:]}",
            created_at=now,
            balance_micros=0,
            reserved_micros=0,
            rpm=rpm,
            bucket=rpm,
            bucket_at=now,
            tag=0.0,
            models=sorted(models) or sa.null(),
        )
    )
    key_id = made.inserted_primary_key[0] if made.inserted_primary_key else 0
    if credits_micros:
        ledger.grant(connection, key_id, credits_micros, now)
    return key


def find(connection: sa.Connection, secret: bytes, key: str) -> Key | None:
    """The key with this text; None if unknown or revoked."""
    row = connection.execute(
        sa.select(api_keys.c.id, api_keys.c.name, api_keys.c.models).where(
            api_keys.c.hash == hash_key(secret, key), api_keys.c.revoked_at.is_(None)
        )
    ).first()
    if row is None:
        return None
    return Key(row.id, row.name, frozenset(row.models) if row.models else None)


def rows(connection: sa.Connection) -> list[KeyRow]:
    columns = [api_keys.c[name] for name in KeyRow.__dataclass_fields__]
    found = connection.execute(sa.select(*columns).order_by(api_keys.c.id))
    return [KeyRow(**row._mapping) for row in found]


def revoke(connection: sa.Connection, key_id: int, now: float) -> None:
    """Revoke a key; its queued jobs still run."""
    changed = connection.execute(
        api_keys.update()
        .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
        .values(revoked_at=now)
    )
    if not changed.rowcount:
        raise CommandError(f"there is no key {key_id} that is not revoked; see: imaged keys list")
