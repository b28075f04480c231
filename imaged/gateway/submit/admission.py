"""Admission: key, model, rules, seed, price, and the transaction that queues a job and reserves its
price.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import sqlalchemy as sa
from cachetools import LRUCache, TTLCache

from imaged.catalogue.aliases import Aliases, merge_knobs
from imaged.catalogue.model import Model, price_micros
from imaged.errors import (
    BadParameter,
    KeyInvalid,
    KeyMissing,
    ModelForbidden,
    ModelRetired,
    TooFast,
    UnknownModel,
)
from imaged.gateway.submit.options import fingerprint
from imaged.jobs import DEFAULT_OPTIONS, RequestOptions, new_job_id
from imaged.moderation.rules import REASON, REFUSAL, Rules, texts_to_judge
from imaged.params.image_params import ImageParams
from imaged.prompt.loras import MAX_LORA_WEIGHT, MAX_LORAS
from imaged.store import catalogue
from imaged.store.accounts import keys, rate_limits
from imaged.store.accounts.keys import Key
from imaged.store.jobs import idempotency, queue
from imaged.store.sql.database import Database
from imaged.store.sql.group_commit import Writer

log = logging.getLogger(__name__)

FRESH_S = 2.0  # keys and catalogue are cached so long
CACHED_KEYS = 10_000
HIGHEST_SEED = 999_999_999_999_999


@dataclass(frozen=True)
class Admitted:
    """The job of a request.

    params:   with the seed drawn.
    rate:     what the key may still submit.
    replayed: an earlier request with the same Idempotency-Key made the job.
    """

    job_id: str
    key: Key
    params: ImageParams
    rate: rate_limits.RateLimit
    replayed: bool


class Admission:
    """Looks up keys and models, with a cache, and puts jobs into the queue."""

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
        self._rules, self._retention_s, self._loras = rules, retention_s, loras
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
        """Aliases of a slug."""
        return [alias for alias, (target, _) in self._aliases.ranges.items() if target == slug]

    async def admit(
        self, key: Key, model: Model, params: ImageParams, options: RequestOptions = DEFAULT_OPTIONS
    ) -> Admitted:
        """Reserve the price and queue the job, in one transaction.

        A repeated Idempotency-Key returns the first job and changes nothing. A prompt that the
        rules refuse becomes a FAILED job without its text. Raises BadParameter (unknown LoRA, a
        prompt that changes too often), TooFast, NoCredits or IdempotencyMismatch; nothing has
        happened then.
        """
        await self.check_loras(key, params, options)
        options = replace(
            options, fingerprint=fingerprint(self._secret, model.slug, params, options)
        )
        if params.seed < 0:
            params = replace(params, seed=secrets.randbelow(HIGHEST_SEED - params.samples))
        job_id = new_job_id()
        await self._check_rate(key, options)
        refused = await asyncio.to_thread(self.refused, params)
        if refused:
            params = replace(params, prompt="", negative_prompt=None)

        def put(connection: sa.Connection) -> queue.Placement:
            now = time.time()
            placed = queue.put(
                connection,
                job_id=job_id,
                key_id=key.id,
                model=model.slug,
                params=params,
                cost_micros=options.quoted_micros or price_micros(model, params),
                now=now,
                options=options,
            )
            if refused and placed.job_id == job_id:
                queue.refuse(connection, job_id, REASON, REFUSAL, now, self._retention_s)
            return placed

        placed = await self._writer.write(put)
        self._next_at[key.id] = time.monotonic() + placed.rate.next_at - time.time()
        return Admitted(placed.job_id, key, params, placed.rate, placed.job_id != job_id)

    async def _check_rate(self, key: Key, options: RequestOptions) -> None:
        """Raises TooFast for a key that is known to be over its rate, before its prompt is judged.
        Repeats are free. The transaction that follows decides.
        """
        wait_s = self._next_at.get(key.id, 0.0) - time.monotonic()
        if wait_s > 0 and not await self.repeats(key, options):
            raise TooFast(wait_s, time.time())

    async def check_loras(
        self, key: Key, params: ImageParams, options: RequestOptions = DEFAULT_OPTIONS
    ) -> None:
        """Raises BadParameter for too many LoRAs, weights out of bounds, and unknown names unless
        the request repeats an earlier one.
        """
        asked = params.all_loras
        if not asked:
            return
        if len(asked) > MAX_LORAS:
            raise BadParameter("loras", f"should be at most {MAX_LORAS} with those in the prompt")
        if any(max(abs(lora.unet), abs(lora.text)) > MAX_LORA_WEIGHT for lora in asked):
            most = f"{MAX_LORA_WEIGHT:.0f}"
            raise BadParameter("loras", f"should have weights between -{most} and {most}")
        there = await asyncio.to_thread(self._loras)
        gone = not {lora.name for lora in asked} <= set(there)
        if gone and not await self.repeats(key, options):
            known = ", ".join(list(there)[:20]) or "none"
            raise BadParameter("loras", f"should name files of this server ({known})")

    def refused(self, params: ImageParams) -> bool:
        """Whether a rule refuses the prompt; the log names the rule, never the prompt.

        CPU-bound: call it in a thread. Raises BadParameter for a prompt that changes too often.
        """
        for text in texts_to_judge(params):
            if rule := self._rules.judge(text):
                log.info("a prompt was refused by %s", rule)
                return True
        return False

    async def repeats(self, key: Key, options: RequestOptions) -> bool:
        """Whether a job was put under this Idempotency-Key before."""
        idempotency_key = options.idempotency_key
        return idempotency_key is not None and await self._db.query(
            lambda c: idempotency.known(c, key.id, idempotency_key)
        )
