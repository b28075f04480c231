"""The asynchronous client: the same calls over an async transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import httpx
from httpx_sse import EventSource

from imaged.client import calls
from imaged.client.account import Account
from imaged.client.events import Event, Stream, outcome, progress_bar
from imaged.client.result import AsyncResult
from imaged.errors import ImagedError, InferenceTimeout


class AsyncJob:
    """A submitted job; see imaged.Job."""

    def __init__(self, client: AsyncClient, answer: dict[str, Any]) -> None:
        self._client = client
        self.submit_response = answer
        self.request_id, self.status_url, self.response_url = calls.submitted(answer)

    async def status(self) -> dict[str, Any]:
        return await self._client._ask("GET", self.status_url)

    async def result(self) -> AsyncResult:
        return AsyncResult(await self._client._ask("GET", self.response_url))

    async def cancel(self) -> dict[str, Any]:
        return await self._client._ask("DELETE", self.response_url)

    async def draft(
        self, timeout: float = calls.TIMEOUT_S, interval: float = calls.INTERVAL_S
    ) -> AsyncResult:
        """What there is to look at, once a job submitted with `draft` rests. Seconds.

        Raises InferenceFailed when the job failed, InferenceTimeout after `timeout`.
        """
        start = time.monotonic()
        while not calls.rests(body := await self.status()):
            outcome(body)
            if body["status"] in calls.FINAL:
                raise ImagedError("the job is no draft: it is done")
            if time.monotonic() - start >= timeout:
                raise InferenceTimeout(self.request_id, time.monotonic() - start)
            await asyncio.sleep(interval)
        return AsyncResult(body)

    async def finish(self, samples: Sequence[int] | None = None, **changes: Any) -> dict[str, Any]:
        """Have these pictures of a draft go on to their end, all without a list; then `wait`.

        `prompt` and `guidance_scale` may be others from there on.
        """
        url = f"{self.response_url}/finish"
        return await self._client._ask("POST", url, **calls.finish(samples, changes))

    async def events(self, timeout: float = calls.TIMEOUT_S) -> AsyncGenerator[Event]:
        """What happens to the job, as it happens; see imaged.Job.events."""
        stream = Stream(self.request_id, self.response_url, timeout)
        while not stream.ended:
            try:
                async with self._client.http.stream(**stream.connection()) as response:
                    if response.status_code != 200:
                        await response.aread()
                    if not stream.refused(response):
                        source = EventSource(response)
                        async with aclosing(source.aiter_sse()) as messages:
                            async for message in messages:
                                if event := stream.take(message):
                                    yield event
            except httpx.TransportError as error:
                stream.broke(error)
            if not stream.ended:
                await asyncio.sleep(stream.rest_s)

    async def wait(
        self,
        timeout: float = calls.TIMEOUT_S,
        interval: float = calls.INTERVAL_S,
        *,
        progress: bool = False,
    ) -> AsyncResult:
        """The result, once there is one; raises InferenceFailed or InferenceTimeout.

        With `progress`, a bar on stderr.
        """
        if progress:
            return await self._wait_with_bar(timeout)
        start = time.monotonic()
        while not calls.wait_is_over(body := await self.status()):
            if time.monotonic() - start >= timeout:
                raise InferenceTimeout(self.request_id, time.monotonic() - start)
            await asyncio.sleep(interval)
        outcome(body)
        return await self.result()

    async def _wait_with_bar(self, timeout: float) -> AsyncResult:
        with progress_bar() as bar:
            async for event in self.events(timeout):
                bar.show(event)
                calls.refuse_draft(event.data)
        outcome(event.data)
        return await self.result()


class AsyncClient(Account[Coroutine[Any, Any, dict[str, Any]]]):
    """One server and one key; see imaged.Client."""

    def __init__(
        self, api_key: str | None = None, base_url: str | None = None, timeout: float = 30.0
    ) -> None:
        self.origin = calls.origin(base_url)
        self.http = httpx.AsyncClient(**calls.connection(api_key, base_url, timeout))
        super().__init__(self._ask)

    async def submit_async(self, slug: str, **params: Any) -> AsyncJob:
        """Queue a job and return at once."""
        return AsyncJob(self, await self._ask("POST", f"/v2/{slug}", **calls.submit(params)))

    async def run(self, slug: str, *, progress: bool = False, **params: Any) -> AsyncResult:
        """Queue a job and wait for its result; with `progress`, under a bar on stderr."""
        return await (await self.submit_async(slug, **params)).wait(progress=progress)

    async def run_sync(self, slug: str, **params: Any) -> httpx.Response:
        """One blocking call; `.content` holds the picture."""
        path = f"/v1/{slug}"
        response = await self._send("POST", path, timeout=calls.TIMEOUT_S, **calls.submit(params))
        if not response.is_success:
            raise calls.problem(response)
        return response

    async def _ask(self, method: str, url: str, **more: Any) -> dict[str, Any]:
        return calls.body_of(await self._send(method, url, **more))

    async def _send(self, method: str, url: str, **more: Any) -> httpx.Response:
        with calls.answered():
            return await self.http.request(method, url, **more)

    async def close(self) -> None:
        await self.http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
