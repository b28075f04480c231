"""Admission: key, model, rules, seed, and the transaction that queues a job and reserves its
price.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace

import sqlalchemy as sa
from cachetools import LRUCache, TTLCache

from imaged.catalogue.aliases import Aliases, merge_knobs
from imaged.catalogue.model import Model
from imaged.errors import (
    BadParameter,
    KeyInvalid,
    KeyMissing,
    ModelForbidden,
    ModelRetired,
    Refused,
    TooFast,
    UnknownModel,
)
from imaged.gateway.submit import quotes
from imaged.jobs import Submission
from imaged.moderation.rules import REASON, REFUSAL, Rules
from imaged.params.image_params import ImageParams
from imaged.store import catalogue
from imaged.store.accounts import keys
from imaged.store.accounts.keys import Key
from imaged.store.jobs import queue
from imaged.store.jobs.queue import Placement
from imaged.store.sql.database import Database
from imaged.store.sql.group_commit import Writer

FRESH_S = 2.0  # keys and catalogue are cached so long
CACHED_KEYS = 10_000
HIGHEST_SEED = 999_999_999_999_999


class Admission:
    """Looks up keys and models, with a cache; judges submissions and puts them into the queue."""

    def __init__(
        self,
        db: Database,
        writer: Writer,
        secret: bytes,
        aliases: Aliases,
        rules: Rules,
        retention_s: float,
        loras: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._db, self._writer, self._secret, self._aliases = db, writer, secret, aliases
        self.rules, self._retention_s, self._loras = rules, retention_s, loras
        self._keys: TTLCache[str, Key] = TTLCache(CACHED_KEYS, FRESH_S)
        self._catalogue: tuple[float, Mapping[str, Model]] = (0.0, {})
        #: When a key may submit again, monotonic seconds.
        self._next_at: LRUCache[int, float] = LRUCache(CACHED_KEYS)

    async def key(self, header: str | None) -> Key:
        """The holder of an `x-api-key` header; raises KeyMissing or KeyInvalid."""
        if not header:
            raise KeyMissing()
        if (key := self._keys.get(header)) is None:
            key = await self._db.query(lambda c: keys.find(c, self._secret, header))
            if key is None:
                raise KeyInvalid()
            self._keys[header] = key
        return key

    async def catalogue(self) -> Mapping[str, Model]:
        """Models on offer by slug, at most FRESH_S old."""
        until, offered = self._catalogue
        if until < time.monotonic():
            offered = await self._db.query(catalogue.catalogue)
            self._catalogue = (time.monotonic() + FRESH_S, offered)
        return offered

    async def model(self, slug: str, key: Key) -> Model:
        """The model of a slug or alias, with the alias's bounds; raises UnknownModel, ModelRetired
        or ModelForbidden.
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
        if knobs is None or model.slug == slug:
            return model
        return replace(model, knobs=merge_knobs(model.knobs, knobs))

    async def models(self, key: Key) -> dict[str, Model]:
        """Models that this key may use, by slug; aliases only if the key lists them."""
        slugs = sorted(await self.catalogue() if key.models is None else key.models)
        found = {}
        for slug in slugs:
            with suppress(UnknownModel, ModelRetired):
                found[slug] = await self.model(slug, key)
        return found

    def aliases_of(self, slug: str) -> list[str]:
        """The aliases under which this slug is served too."""
        return [alias for alias, (target, _) in self._aliases.ranges.items() if target == slug]

    async def admit(self, submission: Submission) -> Placement:
        """Reserve the price and queue the job, in one transaction.

        A repeated Idempotency-Key returns the first job and changes nothing. A prompt that the
        rules refuse becomes a FAILED job without its text. Raises BadParameter (unknown LoRA,
        expired quote, a prompt that changes too often), TooFast, NoCredits or IdempotencyMismatch;
        nothing has happened then.
        """
        problem = await self._problem(submission)
        if problem is not None and submission.idempotency_key is None:
            raise problem
        params = _seeded(submission.params)
        refused = problem is None and await asyncio.to_thread(self.rules.refuses, params)
        if refused:
            params = replace(params, prompt="", negative_prompt=None)
        job = replace(submission, params=params)

        def put(connection: sa.Connection) -> Placement:
            now = time.time()
            placed = queue.put(connection, job, now, problem)
            if refused and not placed.repeated:
                queue.refuse(connection, placed.job_id, REASON, REFUSAL, now, self._retention_s)
            return placed

        placed = await self._writer.write(put)
        self._next_at[job.key_id] = time.monotonic() + placed.rate.next_at - time.time()
        return placed

    async def _problem(self, submission: Submission) -> Refused | None:
        """Why the request cannot become a job unless it repeats an earlier one: its key is known to
        be over its rate, its quote has expired, or a LoRA is not there. No prompt is judged then.
        """
        wait_s = self._next_at.get(submission.key_id, 0.0) - time.monotonic()
        if wait_s > 0:
            return TooFast(wait_s, time.time())
        if time.time() > submission.quoted_until:
            return quotes.expired()
        return await self.missing_lora(submission.params)

    async def missing_lora(self, params: ImageParams) -> BadParameter | None:
        """The refusal of a request for LoRAs that this server does not have."""
        names = {lora.name for lora in params.all_loras}
        there = await asyncio.to_thread(self._loras) if names else ()
        if names <= set(there):
            return None
        known = ", ".join(list(there)[:20]) or "none"
        return BadParameter("loras", f"should name files of this server ({known})")


def _seeded(params: ImageParams) -> ImageParams:
    """With a seed drawn where none was asked for."""
    if params.seed >= 0:
        return params
    return replace(params, seed=secrets.randbelow(HIGHEST_SEED - params.samples))
