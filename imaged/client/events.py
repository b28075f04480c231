"""A job's event stream as the client reads it: what arrives, and going on after it broke off.

Nothing here does I/O; both clients share it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from httpx_sse import ServerSentEvent

from imaged.client import calls
from imaged.errors import InferenceFailed, InferenceTimeout, NoAnswer

if TYPE_CHECKING:
    from tqdm import tqdm

SILENCE_S = 45.0  # a stream silent for so long is broken: the server speaks every 15 s
MAX_STREAM_S = 3600.0  # that the server lets one stream live
ATTEMPTS = 5  # connections in a row that brought nothing


@dataclass(frozen=True)
class Event:
    """`kind` is "state", "progress", "preview" or, last of all, "done"; see the API's events."""

    kind: str
    data: dict[str, Any]


class Stream:
    """One job's events over as many connections as it takes, each from where the last broke off."""

    def __init__(self, request_id: str, response_url: str, timeout_s: float) -> None:
        self.url = f"{response_url}/events"
        self.ended = False
        self._pause_s = 1.0  # until the server names another
        self._request_id, self._timeout_s = request_id, timeout_s
        self._begun = time.monotonic()
        self._last_id = ""
        self._in_vain = 0
        self._error: Exception | None = None

    def connection(self) -> dict[str, Any]:
        """Arguments of the next request.

        Raises InferenceTimeout when there is no time for one, NoAnswer after too many in vain.
        """
        left = self._left_s
        if left <= 0:
            raise InferenceTimeout(self._request_id, self._timeout_s - left)
        if self._in_vain >= ATTEMPTS:
            problem = f"the event stream broke off {ATTEMPTS} times without an event"
            raise NoAnswer(problem) from self._error
        self._in_vain += 1
        last = {"last-event-id": self._last_id} if self._last_id else {}
        return {
            "method": "GET",
            "url": self.url,
            "params": {"wait": f"{min(left, MAX_STREAM_S):.3f}"},
            "headers": {"accept": "text/event-stream", **last},
            "timeout": min(SILENCE_S, left + 1),
        }

    @property
    def _left_s(self) -> float:
        return self._timeout_s - (time.monotonic() - self._begun)

    @property
    def rest_s(self) -> float:
        """Seconds to wait before the next connection."""
        return max(0.0, min(self._pause_s, self._left_s))

    def refused(self, response: httpx.Response) -> bool:
        """Whether this answer is no stream: the end was seen (204), or the server is unavailable.

        Any other refusal raises ImagedError; the body must have been read.
        """
        self.ended = response.status_code == 204
        if response.status_code in (502, 503, 504):
            self.broke(calls.problem(response))
            return True
        if not response.is_success:
            raise calls.problem(response)
        return self.ended

    def broke(self, error: Exception) -> None:
        """Record why a connection failed."""
        self._error = error

    def take(self, message: ServerSentEvent) -> Event | None:
        """An event, or None for what only keeps the stream alive."""
        if message.retry is not None:
            self._pause_s = message.retry / 1000
        if not message.data:
            return None
        self._last_id, self._in_vain = message.id, 0
        self.ended = message.event == "done"
        return Event(message.event, json.loads(message.data))


def outcome(body: dict[str, Any]) -> None:
    """Raises InferenceFailed for the status body of a job that failed."""
    if body["status"] == "FAILED":
        raise InferenceFailed(body.get("error"), body)


@contextmanager
def progress_bar() -> Iterator[Bar]:
    """A tqdm bar of denoising steps on stderr."""
    from tqdm import tqdm

    with tqdm(unit="step") as bar:
        yield Bar(bar)


class Bar:
    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar

    def show(self, event: Event) -> None:
        if "status" in event.data:
            self._bar.set_description(event.data["status"].lower())
        if "steps" in event.data:
            self._bar.total = event.data["steps"]
            self._bar.n = event.data["step"]
        self._bar.refresh()
