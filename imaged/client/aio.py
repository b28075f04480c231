"""The asynchronous client: the same calls over an async transport."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx

from imaged.client import calls
from imaged.client.result import AsyncResult
from imaged.errors import InferenceFailed, InferenceTimeout


class AsyncJob:
    """A submitted job; see imaged.Job."""

    def __init__(self, client: AsyncClient, answer: dict[str, Any]) -> None:
        self._client = client
        self.submit_response = answer
        self.request_id, self.status_url, self.response_url = calls.submitted(answer)

    async def status(self) -> dict[str, Any]:
        return calls.read(await self._client.http.get(self.status_url))

    async def result(self) -> AsyncResult:
        return AsyncResult(calls.read(await self._client.http.get(self.response_url)))

    async def cancel(self) -> dict[str, Any]:
        return calls.read(await self._client.http.delete(self.response_url))

    async def wait(
        self, timeout: float = calls.TIMEOUT_S, interval: float = calls.INTERVAL_S
    ) -> AsyncResult:
        """The result, once there is one; raises InferenceFailed or InferenceTimeout."""
        start = time.monotonic()
        while (body := await self.status())["status"] not in calls.FINAL:
            if time.monotonic() - start >= timeout:
                raise InferenceTimeout(self.request_id, time.monotonic() - start)
            await asyncio.sleep(interval)
        if body["status"] == "FAILED":
            raise InferenceFailed(body.get("error"), body)
        return await self.result()


class AsyncClient:
    """One server and one key; see imaged.Client."""

    def __init__(
        self, api_key: str | None = None, base_url: str | None = None, timeout: float = 30.0
    ) -> None:
        self.origin = calls.origin(base_url)
        self.http = httpx.AsyncClient(
            base_url=self.origin,
            headers=calls.headers(api_key),
            timeout=timeout,
            transport=calls.transport(),
        )

    async def submit_async(self, slug: str, **params: Any) -> AsyncJob:
        """Queue a job and return at once."""
        response = await self.http.post(f"/v2/{slug}", **calls.submit(params))
        return AsyncJob(self, calls.read(response))

    async def run(self, slug: str, **params: Any) -> AsyncResult:
        """Queue a job and wait for its result."""
        return await (await self.submit_async(slug, **params)).wait()

    async def run_sync(self, slug: str, **params: Any) -> httpx.Response:
        """One blocking call; `.content` holds the picture."""
        response = await self.http.post(
            f"/v1/{slug}", timeout=calls.TIMEOUT_S, **calls.submit(params)
        )
        if not response.is_success:
            raise calls.problem(response)
        return response

    async def close(self) -> None:
        await self.http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
