"""Who may ask, and at what price: key, catalogue, seed, and one transaction for hold and job."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import sqlalchemy as sa

from imaged.aliases import Aliases, over
from imaged.catalogue import Model, price_micros
from imaged.errors import (
    BadParameter,
    KeyInvalid,
    KeyMissing,
    ModelForbidden,
    ModelRetired,
    TooFast,
    UnknownModel,
)
from imaged.gateway.rules import REASON, REFUSAL, Rules
from imaged.gateway.terms import fingerprint
from imaged.jobs import NO_TERMS, Terms, new_job_id
from imaged.params import MOST_LORAS, MOST_WEIGHT, ImageParams
from imaged.store import keys, limits, models, queue, repeats
from imaged.store.db import Database
from imaged.store.keys import Key
from imaged.store.writer import Writer

log = logging.getLogger(__name__)

FRESH_S = 2.0  # how long a key or the catalogue is believed without asking the store again
HIGHEST_SEED = 999_999_999_999_999


@dataclass(frozen=True)
class Admitted:
    """A job that stands for a request; `replayed` if an earlier request had made it, `params`
    with the seed drawn.
    """

    job_id: str
    key: Key
    params: ImageParams
    share: limits.Share
    replayed: bool


class Admission:
    """Keys and catalogue as this gateway knows them, and the way into the queue."""

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
        self._keys: dict[str, tuple[float, Key]] = {}
        self._catalogue: tuple[float, Mapping[str, Model]] = (0.0, {})
        self._turns: dict[int, float] = {}  # when a key may submit again, as last heard

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
        if knobs is None or model.slug == slug:
            return model
        return replace(model, knobs=over(model.knobs, knobs))

    async def models(self, key: Key) -> dict[str, Model]:
        """What this key may ask for, by slug; of aliases those that it names."""
        slugs = sorted(await self.catalogue() if key.models is None else key.models)
        found = {}
        for slug in slugs:
            with suppress(UnknownModel, ModelRetired):
                found[slug] = await self.model(slug, key)
        return found

    def aliases_of(self, slug: str) -> list[str]:
        """Other slugs under which this one is served."""
        return [alias for alias, (target, _) in self._aliases.ranges.items() if target == slug]

    async def admit(
        self, key: Key, model: Model, params: ImageParams, terms: Terms = NO_TERMS
    ) -> Admitted:
        """Hold the price and queue the job in one transaction, with its seed drawn.

        Under an Idempotency-Key that was used before nothing is held or drawn: the first job
        stands for this one. A prompt that the rules refuse makes a job that has failed; its text
        is not kept. Raises BadParameter for a LoRA that is not there and for a prompt that changes
        too often, TooFast, NoCredits or IdempotencyMismatch, and then nothing has happened.
        """
        await self.check_loras(key, params, terms)
        terms = replace(terms, fingerprint=fingerprint(self._secret, model.slug, params, terms))
        if params.seed < 0:
            params = replace(params, seed=secrets.randbelow(HIGHEST_SEED - params.samples))
        job_id = new_job_id()
        await self._in_turn(key, terms)
        refused = await asyncio.to_thread(self.refused, params)
        if refused:
            params = replace(params, prompt="", negative_prompt=None)

        def put(connection: sa.Connection) -> queue.Placed:
            now = time.time()
            placed = queue.put(
                connection,
                job_id=job_id,
                key_id=key.id,
                model=model.slug,
                params=params,
                cost_micros=terms.quoted_micros or price_micros(model, params),
                now=now,
                terms=terms,
            )
            if refused and placed.job_id == job_id:
                queue.refuse(connection, job_id, REASON, REFUSAL, now, self._retention_s)
            return placed

        placed = await asyncio.wrap_future(self._writer.submit(put))
        if len(self._turns) > 10_000:
            self._turns.clear()
        self._turns[key.id] = time.monotonic() + placed.share.next_at - time.time()
        return Admitted(placed.job_id, key, params, placed.share, placed.job_id != job_id)

    async def _in_turn(self, key: Key, terms: Terms) -> None:
        """Raises TooFast for a key that is known to have nothing left, before a prompt of it is
        judged; a repeat needs nothing. What counts is still the transaction that follows.
        """
        wait_s = self._turns.get(key.id, 0.0) - time.monotonic()  # which no clock sets back
        if wait_s > 0 and not await self.repeats(key, terms):
            raise TooFast(wait_s, time.time())

    async def check_loras(self, key: Key, params: ImageParams, terms: Terms = NO_TERMS) -> None:
        """Raises BadParameter for too many LoRAs, and for one that is not there any more unless
        this repeats a request from when it was.
        """
        asked = params.all_loras
        if not asked:
            return
        if len(asked) > MOST_LORAS:
            raise BadParameter("loras", f"should be at most {MOST_LORAS} with those in the prompt")
        if any(max(abs(lora.unet), abs(lora.text)) > MOST_WEIGHT for lora in asked):
            raise BadParameter(
                "loras", f"should have weights between {-MOST_WEIGHT:.0f} and {MOST_WEIGHT:.0f}"
            )
        there = await asyncio.to_thread(self._loras)
        gone = not {lora.name for lora in asked} <= set(there)
        if gone and not await self.repeats(key, terms):
            known = ", ".join(list(there)[:20]) or "none"
            raise BadParameter("loras", f"should name files of this server ({known})")

    def refused(self, params: ImageParams) -> bool:
        """Whether a rule refuses what the prompt says; the log names the rule, never the prompt.

        Takes time: use a thread. Raises BadParameter for a prompt that changes too often.
        """
        for text in params.said():
            if rule := self._rules.judge(text):
                log.info("a prompt was refused by %s", rule)
                return True
        return False

    async def repeats(self, key: Key, terms: Terms) -> bool:
        """Whether a job was put under this Idempotency-Key before."""
        word = terms.idempotency_key
        return word is not None and await asyncio.to_thread(self._known, key, word)

    def _known(self, key: Key, idempotency_key: str) -> bool:
        with self._db.read() as connection:
            return repeats.known(connection, key.id, idempotency_key)

    def _find(self, header: str) -> Key | None:
        with self._db.read() as connection:
            return keys.find(connection, self._secret, header)

    def _read(self, read: object) -> Mapping[str, Model]:
        with self._db.read() as connection:
            return models.catalogue(connection)
