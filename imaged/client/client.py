"""The synchronous client.

import imaged
result = imaged.run("sdxl1.0-yamers-realistic", prompt="a red house by a blue lake")
print(result["output"])
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
from httpx_sse import EventSource

from imaged.client import calls
from imaged.client.account import Account
from imaged.client.events import Event, Stream, outcome, progress_bar
from imaged.client.result import Result
from imaged.errors import ImagedError, InferenceTimeout


class Job:
    """A submitted job: ask for its status, or wait for its result."""

    def __init__(self, client: Client, answer: dict[str, Any]) -> None:
        self._client = client
        self.submit_response = answer
        self.request_id, self.status_url, self.response_url = calls.submitted(answer)

    def status(self) -> dict[str, Any]:
        """The status body: QUEUED, PROCESSING (with step and steps), COMPLETED or FAILED."""
        return self._client._ask("GET", self.status_url)

    def result(self) -> Result:
        """The result body; complete once the status is COMPLETED."""
        return Result(self._client._ask("GET", self.response_url))

    def cancel(self) -> dict[str, Any]:
        """End the job, wherever it is; the status body after that."""
        return self._client._ask("DELETE", self.response_url)

    def draft(self, timeout: float = calls.TIMEOUT_S, interval: float = calls.INTERVAL_S) -> Result:
        """What there is to look at, once a job submitted with `draft` rests. Seconds.

        Raises InferenceFailed when the job failed, InferenceTimeout after `timeout`.
        """
        start = time.monotonic()
        while not calls.rests(body := self.status()):
            outcome(body)
            if body["status"] in calls.FINAL:
                raise ImagedError("the job is no draft: it is done")
            if time.monotonic() - start >= timeout:
                raise InferenceTimeout(self.request_id, time.monotonic() - start)
            time.sleep(interval)
        return Result(body)

    def finish(self, samples: Sequence[int] | None = None, **changes: Any) -> dict[str, Any]:
        """Have these pictures of a draft go on to their end, all without a list; then `wait`.

        `prompt` and `guidance_scale` may be others from there on.
        """
        url = f"{self.response_url}/finish"
        return self._client._ask("POST", url, **calls.finish(samples, changes))

    def events(self, timeout: float = calls.TIMEOUT_S) -> Iterator[Event]:
        """What happens to the job, as it happens; the last event's kind is "done".

        A connection that breaks off is taken up again where it was. Seconds. Raises
        InferenceTimeout after `timeout`, NoAnswer when the server stays away.
        """
        stream = Stream(self.request_id, self.response_url, timeout)
        while not stream.ended:
            try:
                with self._client.http.stream(**stream.connection()) as response:
                    if response.status_code != 200:
                        response.read()
                    if not stream.refused(response):
                        source = EventSource(response)
                        for message in source.iter_sse():
                            if event := stream.take(message):
                                yield event
            except httpx.TransportError as error:
                stream.broke(error)
            if not stream.ended:
                time.sleep(stream.rest_s)

    def wait(
        self,
        timeout: float = calls.TIMEOUT_S,
        interval: float = calls.INTERVAL_S,
        *,
        progress: bool = False,
    ) -> Result:
        """The result, once there is one. Seconds. With `progress`, a bar on stderr shows the steps
        as the server tells of them, and `interval` does not matter.

        Raises InferenceFailed when the job failed, InferenceTimeout after `timeout`.
        """
        if progress:
            return self._wait_with_bar(timeout)
        start = time.monotonic()
        while not calls.wait_is_over(body := self.status()):
            if time.monotonic() - start >= timeout:
                raise InferenceTimeout(self.request_id, time.monotonic() - start)
            time.sleep(interval)
        outcome(body)
        return self.result()

    def _wait_with_bar(self, timeout: float) -> Result:
        with progress_bar() as bar:
            for event in self.events(timeout):
                bar.show(event)
                calls.refuse_draft(event.data)
        outcome(event.data)
        return self.result()


class Client(Account[dict[str, Any]]):
    """One server and one key; both may come from the environment (IMAGED_URL, IMAGED_API_KEY)."""

    def __init__(
        self, api_key: str | None = None, base_url: str | None = None, timeout: float = 30.0
    ) -> None:
        self.origin = calls.origin(base_url)
        self.http = httpx.Client(**calls.connection(api_key, base_url, timeout))
        super().__init__(self._ask)

    def submit_async(self, slug: str, **params: Any) -> Job:
        """Queue a job and return at once."""
        return Job(self, self._ask("POST", f"/v2/{slug}", **calls.submit(params)))

    def run(self, slug: str, *, progress: bool = False, **params: Any) -> Result:
        """Queue a job and wait for its result; with `progress`, under a bar on stderr."""
        return self.submit_async(slug, **params).wait(progress=progress)

    def run_sync(self, slug: str, **params: Any) -> httpx.Response:
        """One blocking call; `.content` holds the picture."""
        path = f"/v1/{slug}"
        response = self._send("POST", path, timeout=calls.TIMEOUT_S, **calls.submit(params))
        if not response.is_success:
            raise calls.problem(response)
        return response

    def _ask(self, method: str, url: str, **more: Any) -> dict[str, Any]:
        return calls.body_of(self._send(method, url, **more))

    def _send(self, method: str, url: str, **more: Any) -> httpx.Response:
        with calls.answered():
            return self.http.request(method, url, **more)

    def close(self) -> None:
        self.http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


SegmindClient = Client  # the vendor's name, so that `import imaged as segmind` runs its code

_default: Client | None = None


def default() -> Client:
    """The client of the module's functions, made at first use from the environment."""
    global _default
    _default = _default or Client()
    return _default


def run(slug: str, *, progress: bool = False, **params: Any) -> Result:
    """Queue a job with the default client and wait for its result; see Client.run."""
    return default().run(slug, progress=progress, **params)


def run_sync(slug: str, **params: Any) -> httpx.Response:
    """One blocking call with the default client."""
    return default().run_sync(slug, **params)


def submit_async(slug: str, **params: Any) -> Job:
    """Queue a job with the default client."""
    return default().submit_async(slug, **params)
