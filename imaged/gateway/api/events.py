"""GET /v2/requests/{id}/events: a job's life as server-sent events.

    state     the status body, at every change of state before the last
    progress  step, steps, unet_calls_done, unet_calls
    preview   content_type, base64 and call of a small JPEG of the first picture
    done      the status body of a job that has ended; the stream ends with it

Every event's id says what has been seen up to it, so that a client that comes back with it in
`Last-Event-ID` gets what is new since then and nothing again. Format: WHATWG HTML, 9.2.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace

import msgspec
import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from imaged.gateway.auth import owned
from imaged.gateway.context import Gateway
from imaged.gateway.present import bodies
from imaged.gateway.present.answer import Body
from imaged.gateway.present.links import Links
from imaged.gateway.read.job_reader import read_wait
from imaged.jobs import Job, Preview, State

log = logging.getLogger(__name__)

LIFE_S = 3600.0  # of one stream; who wants more comes back
GRACE_S = 30.0  # and so much later it is cut, also when its reader has stopped reading
SILENCE_S = 15.0  # then a comment says that the stream is alive
RETRY_MS = 1000  # what EventSource waits before it comes back
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
ID = re.compile(r"([A-Z]{1,20})\.(\d{1,9})\.(\d{1,9})\.(\d{1,9})", re.ASCII)


@dataclass(frozen=True)
class Seen:
    """What a client knows: the state, and of the attempt `epoch` the calls and the preview."""

    state: str = ""
    epoch: int = 0
    calls: int = 0
    preview: int = 0

    @classmethod
    def read(cls, text: str | None) -> Seen:
        """From an event's id; any other text means that nothing was seen."""
        match = ID.fullmatch(text or "")
        return cls(match[1], *map(int, match.groups()[1:])) if match else cls()

    def __str__(self) -> str:
        return f"{self.state}.{self.epoch}.{self.calls}.{self.preview}"

    def attempt(self, job: Job) -> Seen:
        """A new attempt begins with nothing made."""
        same = self.epoch == job.epoch
        return self if same else replace(self, epoch=job.epoch, calls=0, preview=0)


@dataclass(frozen=True)
class Event:
    kind: str
    seen: Seen  # after it
    data: Body

    def encode(self) -> str:
        data = msgspec.json.encode(self.data).decode()
        return f"event: {self.kind}\nid: {self.seen}\ndata: {data}\n\n"


@owned
async def events(request: Request, gateway: Gateway, job: Job) -> Response:
    """GET /v2/requests/{id}/events: a job's life as it happens, as server-sent events.

    204 for a client that has seen the end of the stream: EventSource stops at that.
    """
    wait_s = read_wait(request.query_params.get("wait") or str(LIFE_S), LIFE_S)
    seen = Seen.read(request.headers.get("last-event-id"))
    if job.state.final and seen.state == bodies.wire_state(job):
        return Response(status_code=204)
    if request.method == "HEAD":
        return Response(media_type="text/event-stream", headers=HEADERS)
    return Stream(follow(gateway, job, gateway.links(request), seen, wait_s))


class Stream(StreamingResponse):
    """Ends when its client leaves, and is cut GRACE_S after LIFE_S: a client that has stopped
    reading would keep it open.
    """

    def __init__(self, chunks: AsyncGenerator[str]) -> None:
        super().__init__(chunks, headers=HEADERS, media_type="text/event-stream")
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(LIFE_S + GRACE_S), aclosing(self._chunks):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.info("an event stream was cut: its reader does not read")


async def follow(
    gateway: Gateway, first: Job, links: Links, seen: Seen, wait_s: float
) -> AsyncGenerator[str]:
    """The chunks of the stream until the job, `wait_s` or the server has ended."""
    yield f"retry: {RETRY_MS}\n\n"
    job, spoke = first, time.monotonic()
    end = spoke + wait_s
    try:
        while (left_s := end - time.monotonic()) > 0 and not gateway.stopping():
            for event in news(job, await _new_preview(gateway, job, seen), seen, links):
                seen, spoke = event.seen, time.monotonic()
                yield event.encode()
            if job.state.final:
                return
            if time.monotonic() - spoke >= SILENCE_S:
                spoke = time.monotonic()
                yield ": waiting\n\n"
            silence_s = spoke + SILENCE_S - time.monotonic()
            after = await gateway.reader.after(job, max(0.0, min(left_s, silence_s)))
            if after is None:
                return
            job = after
    except sa.exc.OperationalError:
        log.exception("the store did not answer; the client comes back")


def news(job: Job, preview: Preview | None, seen: Seen, links: Links) -> Iterator[Event]:
    """The events for a client that has `seen` so much."""
    seen, moved = seen.attempt(job), (job.state, job.epoch) != (seen.state, seen.epoch)
    if moved and not job.state.final:
        seen = replace(seen, state=job.state)
        yield Event("state", seen, bodies.status(job, links)[1])
    if job.state in (State.PROCESSING, State.COMPLETED) and job.calls_done != seen.calls:
        seen = replace(seen, calls=job.calls_done)
        yield Event("progress", seen, bodies.steps_done(job))
    if preview is not None and preview.call != seen.preview:
        seen = replace(seen, preview=preview.call)
        yield Event("preview", seen, bodies.preview(preview))
    if job.state.final:
        seen = replace(seen, state=bodies.wire_state(job))
        yield Event("done", seen, bodies.status(job, links)[1])


async def _new_preview(gateway: Gateway, job: Job, seen: Seen) -> Preview | None:
    """The job's preview, read from the store only when it is another than the one seen."""
    if job.state is not State.PROCESSING or not job.preview_call:
        return None
    if (job.epoch, job.preview_call) == (seen.epoch, seen.preview):
        return None
    return await gateway.reader.preview(job)
