"""Tells webhooks of ended jobs: signed, at least once, with patience, and to public addresses."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import httpx
from standardwebhooks import Webhook as Signer

from imaged.errors import BadParameter
from imaged.gateway.reach import Reach, UnsafeAddress, host_of
from imaged.gateway.replies import dollars
from imaged.jobs import State
from imaged.store import outbox, webhooks
from imaged.store.db import Database
from imaged.store.outbox import Parcel
from imaged.store.writer import Writer

log = logging.getLogger(__name__)

TICK_S = 0.5
TIMEOUT_S = 10.0  # of a whole attempt: name, connection, request, answer
LARGEST_REPLY = 65_536  # bytes that are read of an answer; nobody is shown them
WAITS_S = (5.0, 30.0, 120.0, 600.0, 3600.0, 10_800.0, 21_600.0)  # after the first, second ...
JITTER = 0.2  # either way
MOST, MOST_EACH = 64, 8  # attempts at a time, for all API keys and for one
LOG_S, SWEEP_S = 7 * 86_400.0, 60.0


class Dispatcher:
    """One a gateway; several share the outbox by leases."""

    def __init__(
        self, db: Database, writer: Writer, secret: bytes, reach: Reach, public_url: str = ""
    ) -> None:
        self._db, self._writer, self._secret, self._reach = db, writer, secret, reach
        self._origin = public_url.rstrip("/")
        self._trusted = httpx.create_ssl_context()
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy: Counter[int] = Counter()
        self._swept = 0.0

    async def run(self) -> None:
        """Until cancelled; then what is under way is left to its lease."""
        try:
            while True:
                await asyncio.sleep(TICK_S)
                try:
                    await self.turn()
                except Exception:  # whatever it is: without this loop nobody hears of anything
                    log.exception("the outbox could not be read; trying again")
        finally:
            for task in self._tasks:
                task.cancel()

    async def turn(self) -> None:
        """Start an attempt for every row that is due, as far as there is room."""
        now, room = time.time(), MOST - len(self._tasks)
        if room > 0 and await asyncio.to_thread(self._any_due, now):
            full = [key_id for key_id, n in self._busy.items() if n >= MOST_EACH]
            taken = self._writer.submit(lambda c: outbox.lease(c, now, room, MOST_EACH, full))
            for parcel in await asyncio.wrap_future(taken):
                self._start(parcel)
        if now - self._swept > SWEEP_S:
            self._swept = now
            await asyncio.wrap_future(self._writer.submit(lambda c: outbox.expire(c, now - LOG_S)))

    async def settled(self) -> None:
        """When all attempts under way have ended."""
        await asyncio.gather(*self._tasks)

    def _start(self, parcel: Parcel) -> None:
        task = asyncio.create_task(self._tell(parcel))
        self._busy[parcel.key_id] += 1
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._done(done, parcel))

    def _done(self, task: asyncio.Task[None], parcel: Parcel) -> None:
        self._tasks.discard(task)
        self._busy -= Counter([parcel.key_id])
        if not task.cancelled() and (error := task.exception()):
            log.error("%s was not noted; it will be told again", parcel.id, exc_info=error)

    async def _tell(self, parcel: Parcel) -> None:
        status, problem = await self._attempt(parcel)
        now = time.time()

        def note(connection: Any) -> None:
            if problem is None and status is not None:
                outbox.delivered(connection, parcel, status, now)
            elif status == 410:
                outbox.gone(connection, parcel.webhook_id, now)
            else:
                wait_s = again_in_s(parcel.attempt)
                outbox.failed(connection, parcel, status, problem or "", now, wait_s)

        await asyncio.wrap_future(self._writer.submit(note))

    async def _attempt(self, parcel: Parcel) -> tuple[int | None, str | None]:
        """Status and problem of one attempt; without a problem it was delivered."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status = await self._post(parcel)
        except TimeoutError:
            return None, f"no answer within {TIMEOUT_S:.0f} s"
        except (UnsafeAddress, BadParameter):
            return None, "the address is not a public one"
        except OSError:
            return None, "there is no such host"
        except (httpx.HTTPError, httpx.InvalidURL):
            return None, "no connection, or no answer that is HTTP"
        except Exception:  # whatever it is: this counts as an attempt, and there are only so many
            log.exception("%s could not be told", parcel.id)
            return None, "an error of this server"
        return status, None if 200 <= status < 300 else f"the answer was {status}"

    async def _post(self, parcel: Parcel) -> int:
        """The status of the answer. The connection goes to an address that was looked at, with
        the name in Host and in the certificate's check; no redirect is followed.
        """
        url = self._reach.check(parcel.url)
        address = await self._reach.resolve(url, parcel.key_id)
        body = json.dumps(message(parcel, self._origin), separators=(",", ":"))
        headers = {**self._signature(parcel, body), "host": url.netloc.decode("ascii")}
        request = httpx.Request(
            "POST",
            url.copy_with(host=address),
            headers=headers,
            content=body.encode(),
            extensions={
                "sni_hostname": host_of(url),
                "timeout": httpx.Timeout(TIMEOUT_S).as_dict(),
            },
        )
        # One connection an attempt: a certificate that was checked for one name is no other's.
        async with httpx.AsyncClient(trust_env=False, verify=self._trusted) as client:
            answer = await client.send(request, stream=True)
            try:
                read = 0
                async for part in answer.aiter_raw():
                    read += len(part)
                    if read > LARGEST_REPLY:
                        break
            finally:
                await answer.aclose()
        return answer.status_code

    def _signature(self, parcel: Parcel, body: str) -> dict[str, str]:
        """The headers of Standard Webhooks; the id stays over all attempts."""
        now = datetime.now(UTC)
        signer = Signer(webhooks.secret_of(self._secret, parcel.webhook_id))
        return {
            "webhook-id": parcel.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": signer.sign(parcel.id, now, body),
            "content-type": "application/json",
            "user-agent": "imaged-webhooks/1",
        }

    def _any_due(self, now: float) -> bool:
        with self._db.read() as connection:
            return outbox.any_due(connection, now)


def again_in_s(attempt: int) -> float | None:
    """How long to wait after this attempt, or None when it was the last."""
    if attempt > len(WAITS_S):
        return None
    return WAITS_S[attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)


def message(parcel: Parcel, origin: str) -> dict[str, Any]:
    """What a webhook is told; the same at every attempt. `origin` is empty if none is configured.

    The prompt and the pictures are not in it: who is told fetches the result with the key.
    """
    facts = parcel.facts
    completed = facts["state"] == State.COMPLETED
    started, finished = facts["started_at"] or facts["finished_at"], facts["finished_at"]
    data: dict[str, Any] = {
        "request_id": facts["id"],
        "model": facts["model"],
        "status": State.COMPLETED if completed else State.FAILED,
        "metrics": {
            "queue_time": round(started - facts["created_at"], 6),
            "total_time": round(finished - facts["created_at"], 6),
        },
    }
    if completed or facts.get("remaining_micros") is not None:
        data["metrics"]["cost"] = dollars(facts["cost_micros"])
    if not completed:
        data.update(error=facts["error"], code=facts["reason"])
    if origin:
        data["response_url"] = f"{origin}/v2/requests/{facts['id']}"
    at = datetime.fromtimestamp(finished, UTC).isoformat(timespec="milliseconds")
    return {"type": parcel.type, "timestamp": at.replace("+00:00", "Z"), "data": data}
