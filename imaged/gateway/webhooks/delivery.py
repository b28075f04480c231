"""Webhook delivery: signed, at least once, with retries and back-off, to public addresses only."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import Counter
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import httpx
from standardwebhooks import Webhook as Signer

from imaged.errors import BadParameter
from imaged.gateway.present.bodies import durations
from imaged.gateway.present.units import dollars
from imaged.gateway.webhooks.url_guard import UnsafeAddress, UrlGuard, host_of
from imaged.jobs import State
from imaged.store.sql.database import Database
from imaged.store.sql.group_commit import Writer
from imaged.store.webhooks import outbox, subscriptions
from imaged.store.webhooks.outbox import QueuedEvent

log = logging.getLogger(__name__)

TICK_S = 0.5
TIMEOUT_S = 10.0  # of a whole attempt: name, connection, request, answer
MAX_REPLY_BYTES = 65_536  # bytes that are read of an answer; nobody is shown them
WAITS_S = (5.0, 30.0, 120.0, 600.0, 3600.0, 10_800.0, 21_600.0)  # before each retry
JITTER = 0.2  # either way
MAX_DELIVERIES, MAX_DELIVERIES_PER_KEY = 64, 8  # attempts at a time, for all API keys and for one
LOG_S, SWEEP_S = 7 * 86_400.0, 60.0


class WebhookDelivery:
    """One per gateway process; several share the outbox by leases."""

    def __init__(
        self, db: Database, writer: Writer, secret: bytes, url_guard: UrlGuard, public_url: str = ""
    ) -> None:
        self._db, self._writer, self._secret, self._url_guard = db, writer, secret, url_guard
        self._origin = public_url.rstrip("/")
        self._trusted = httpx.create_ssl_context()
        self.under_way: set[asyncio.Task[None]] = set()
        self._busy: Counter[int] = Counter()
        self._swept = 0.0

    async def run(self) -> None:
        """Until cancelled; attempts under way are then retried after their lease."""
        try:
            while True:
                await asyncio.sleep(TICK_S)
                try:
                    await self.turn()
                except Exception:  # this loop must not end
                    log.exception("the outbox could not be read; trying again")
        finally:
            for task in self.under_way:
                task.cancel()

    async def turn(self) -> None:
        """Start attempts for due events, up to the limits."""
        now, room = time.time(), MAX_DELIVERIES - len(self.under_way)
        if room > 0 and await self._db.query(lambda c: outbox.any_due(c, now)):
            full = [key_id for key_id, n in self._busy.items() if n >= MAX_DELIVERIES_PER_KEY]
            for event in await self._writer.write(
                lambda c: outbox.lease(c, now, room, MAX_DELIVERIES_PER_KEY, full)
            ):
                self._start(event)
        if now - self._swept > SWEEP_S:
            self._swept = now
            await self._writer.write(lambda c: outbox.delete_older(c, now - LOG_S))

    async def drain(self) -> None:
        """Wait for all attempts under way."""
        await asyncio.gather(*self.under_way)

    def _start(self, event: QueuedEvent) -> None:
        task = asyncio.create_task(self._tell(event))
        self._busy[event.key_id] += 1
        self.under_way.add(task)
        task.add_done_callback(lambda done: self._done(done, event))

    def _done(self, task: asyncio.Task[None], event: QueuedEvent) -> None:
        self.under_way.discard(task)
        self._busy -= Counter([event.key_id])
        if not task.cancelled() and (error := task.exception()):
            log.error("%s was not noted; it will be told again", event.id, exc_info=error)

    async def _tell(self, event: QueuedEvent) -> None:
        status, problem = await self._attempt(event)
        now = time.time()

        def note(connection: Any) -> None:
            if problem is None and status is not None:
                outbox.delivered(connection, event, status, now)
            elif status == 410:
                outbox.gone(connection, event.webhook_id, now)
            else:
                wait_s = again_in_s(event.attempt)
                outbox.failed(connection, event, status, problem or "", now, wait_s)

        await self._writer.write(note)

    async def _attempt(self, event: QueuedEvent) -> tuple[int | None, str | None]:
        """HTTP status and problem of one attempt; no problem means delivered."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status = await self._post(event)
        except TimeoutError:
            return None, f"no answer within {TIMEOUT_S:.0f} s"
        except (UnsafeAddress, BadParameter):
            return None, "the address is not a public one"
        except OSError:
            return None, "there is no such host"
        except (httpx.HTTPError, httpx.InvalidURL):
            return None, "no connection, or no answer that is HTTP"
        except Exception:  # counts as an attempt too, so that retries end
            log.exception("%s could not be told", event.id)
            return None, "an error of this server"
        return status, None if 200 <= status < 300 else f"the answer was {status}"

    async def _post(self, event: QueuedEvent) -> int:
        """POST the event; returns the HTTP status. Connects to the address that the URL guard
        checked, with the host name for Host and TLS; follows no redirect.
        """
        url = self._url_guard.check(event.url)
        address = await self._url_guard.resolve(url, event.key_id)
        body = json.dumps(message(event, self._origin), separators=(",", ":"))
        headers = {**self._signature(event, body), "host": url.netloc.decode("ascii")}
        request = httpx.Request(
            "POST",
            url.copy_with(host=address),
            headers=headers,
            content=body.encode(),
            extensions={"sni_hostname": host_of(url)},
        )
        # A connection per attempt: one to the same address may be of another host name.
        async with (
            httpx.AsyncClient(trust_env=False, verify=self._trusted) as client,
            aclosing(await client.send(request, stream=True)) as answer,
        ):
            read = 0
            async for part in answer.aiter_raw():
                read += len(part)
                if read > MAX_REPLY_BYTES:
                    break
        return answer.status_code

    def _signature(self, event: QueuedEvent, body: str) -> dict[str, str]:
        """Headers of Standard Webhooks; the id is the same at every attempt."""
        now = datetime.now(UTC)
        signer = Signer(subscriptions.secret_of(self._secret, event.webhook_id))
        return {
            "webhook-id": event.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": signer.sign(event.id, now, body),
            "content-type": "application/json",
            "user-agent": "imaged-webhooks/1",
        }


def again_in_s(attempt: int) -> float | None:
    """Seconds until the next attempt, with jitter; None after the last."""
    if attempt > len(WAITS_S):
        return None
    return WAITS_S[attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)


def message(event: QueuedEvent, origin: str) -> dict[str, Any]:
    """The body, the same at every attempt, without prompt and images: the receiver fetches the
    result with its key. origin: IMAGED_PUBLIC_URL or "".
    """
    facts = event.facts
    completed = facts["state"] == State.COMPLETED
    started, finished = facts["started_at"] or facts["finished_at"], facts["finished_at"]
    data: dict[str, Any] = {
        "request_id": facts["id"],
        "model": facts["model"],
        "status": State.COMPLETED if completed else State.FAILED,
        "metrics": durations(facts["created_at"], started, finished),
    }
    if completed or facts.get("remaining_micros") is not None:
        data["metrics"]["cost"] = dollars(facts["cost_micros"])
    if not completed:
        data.update(error=facts["error"], code=facts["reason"])
    if origin:
        data["response_url"] = f"{origin}/v2/requests/{facts['id']}"
    at = datetime.fromtimestamp(finished, UTC).isoformat(timespec="milliseconds")
    return {"type": event.type, "timestamp": at.replace("+00:00", "Z"), "data": data}
