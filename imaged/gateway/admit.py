"""Who may ask, and at what price: key, catalogue, seed, and one transaction for hold and job."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import sqlalchemy as sa

from imaged.aliases import Aliases
from imaged.catalogue import Model, price_micros
from imaged.errors import KeyInvalid, KeyMissing, ModelForbidden, ModelRetired, UnknownModel
from imaged.jobs import new_job_id
from imaged.params import ImageParams
from imaged.store import keys, models, queue
from imaged.store.db import Database
from imaged.store.keys import Key
from imaged.store.writer import Writer

FRESH_S = 2.0  # how long a key or the catalogue is believed without asking the store again
HIGHEST_SEED = 999_999_999_999_999


@dataclass(frozen=True)
class Admitted:
    """A job in the queue; `params` with the seed drawn."""

    job_id: str
    key: Key
    params: ImageParams
    share: queue.Share


class Admission:
    """Keys and catalogue as this gateway knows them, and the way into the queue."""

    def __init__(self, db: Database, writer: Writer, secret: bytes, aliases: Aliases) -> None:
        self._db, self._writer, self._secret, self._aliases = db, writer, secret, aliases
        self._keys: dict[str, tuple[float, Key]] = {}
        self._catalogue: tuple[float, Mapping[str, Model]] = (0.0, {})

    async def key(self, header: str | None) -> Key:
        """The holder of an `x-api-key` header; raises KeyMissing or KeyInvalid."""
        if not header:
            raise KeyMissing()
        known = self._keys.get(header)
        if known and known[0] > time.monotonic():
            return known[1]
        key = await asyncio.to_thread(self._find, header)
        if key is None:
            self._keys.pop(header, None)
            raise KeyInvalid()
        if len(self._keys) > 10_000:
            self._keys.clear()
        self._keys[header] = (time.monotonic() + FRESH_S, key)
        return key

    async def catalogue(self) -> Mapping[str, Model]:
        until, offered = self._catalogue
        if until < time.monotonic():
            offered = await asyncio.to_thread(self._read, models.catalogue)
            self._catalogue = (time.monotonic() + FRESH_S, offered)
        return offered

    async def model(self, slug: str, key: Key) -> Model:
        """What this key gets under this slug or alias.

        Raises UnknownModel, ModelRetired or ModelForbidden.
        """
        if slug in self._aliases.retired:
            raise ModelRetired(f"This model is not served any more: {self._aliases.retired[slug]}")
        offered = await self.catalogue()
        target, knobs = self._aliases.ranges.get(slug, (slug, None))
        model = offered.get(slug) or offered.get(target)
        if model is None:
            raise UnknownModel()
        if key.models is not None and not {slug, model.slug} & key.models:
            raise ModelForbidden()
        return replace(model, knobs=knobs) if knobs and model.slug != slug else model

    def aliases_of(self, slug: str) -> list[str]:
        """Other slugs under which this one is served."""
        return [alias for alias, (target, _) in self._aliases.ranges.items() if target == slug]

    async def admit(self, key: Key, model: Model, params: ImageParams) -> Admitted:
        """Hold the price and queue the job in one transaction.

        Raises TooFast or NoCredits, and then nothing has happened.
        """
        if params.seed < 0:
            params = replace(params, seed=secrets.randbelow(HIGHEST_SEED - params.samples))
        job_id = new_job_id()

        def put(connection: sa.Connection) -> queue.Share:
            return queue.put(
                connection,
                job_id=job_id,
                key_id=key.id,
                model=model.slug,
                params=params,
                cost_micros=price_micros(model, params),
                now=time.time(),
            )

        share = await asyncio.wrap_future(self._writer.submit(put))
        return Admitted(job_id, key, params, share)

    def _find(self, header: str) -> Key | None:
        with self._db.read() as connection:
            return keys.find(connection, self._secret, header)

    def _read(self, read: object) -> Mapping[str, Model]:
        with self._db.read() as connection:
            return models.catalogue(connection)
