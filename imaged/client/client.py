"""The synchronous client.

import imaged
result = imaged.run("sdxl1.0-yamers-realistic", prompt="a red house by a blue lake")
print(result["output"])
"""

from __future__ import annotations

import time
from typing import Any

import httpx

from imaged.client import calls
from imaged.client.account import Accounts, Generations, Models
from imaged.client.result import Result
from imaged.errors import InferenceFailed, InferenceTimeout


class Job:
    """A submitted job: ask for its status, or wait for its result."""

    def __init__(self, client: Client, answer: dict[str, Any]) -> None:
        self._client = client
        self.submit_response = answer
        self.request_id, self.status_url, self.response_url = calls.submitted(answer)

    def status(self) -> dict[str, Any]:
        """The status body: QUEUED, PROCESSING (with step and steps), COMPLETED or FAILED."""
        return calls.read(self._client.http.get(self.status_url))

    def result(self) -> Result:
        """The result body; complete once the status is COMPLETED."""
        return Result(calls.read(self._client.http.get(self.response_url)))

    def cancel(self) -> dict[str, Any]:
        """End the job, wherever it is; the status body after that."""
        return calls.read(self._client.http.delete(self.response_url))

    def wait(self, timeout: float = calls.TIMEOUT_S, interval: float = calls.INTERVAL_S) -> Result:
        """The result, once there is one. Seconds.

        Raises InferenceFailed when the job failed, InferenceTimeout after `timeout`.
        """
        start = time.monotonic()
        while (body := self.status())["status"] not in calls.FINAL:
            if time.monotonic() - start >= timeout:
                raise InferenceTimeout(self.request_id, time.monotonic() - start)
            time.sleep(interval)
        if body["status"] == "FAILED":
            raise InferenceFailed(body.get("error"), body)
        return self.result()


class Client:
    """One server and one key; both may come from the environment (IMAGED_URL, IMAGED_API_KEY)."""

    def __init__(
        self, api_key: str | None = None, base_url: str | None = None, timeout: float = 30.0
    ) -> None:
        self.origin = calls.origin(base_url)
        self.http = httpx.Client(
            base_url=self.origin,
            headers=calls.headers(api_key),
            timeout=timeout,
            transport=calls.transport(),
        )
        self.models = Models(self.http)
        self.generations = Generations(self.http)
        self.accounts = Accounts(self.http)

    def submit_async(self, slug: str, **params: Any) -> Job:
        """Queue a job and return at once."""
        return Job(self, calls.read(self.http.post(f"/v2/{slug}", **calls.submit(params))))

    def run(self, slug: str, **params: Any) -> Result:
        """Queue a job and wait for its result."""
        return self.submit_async(slug, **params).wait()

    def run_sync(self, slug: str, **params: Any) -> httpx.Response:
        """One blocking call; `.content` holds the picture."""
        response = self.http.post(f"/v1/{slug}", timeout=calls.TIMEOUT_S, **calls.submit(params))
        if not response.is_success:
            raise calls.problem(response)
        return response

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


def run(slug: str, **params: Any) -> Result:
    """Queue a job with the default client and wait for its result."""
    return default().run(slug, **params)


def run_sync(slug: str, **params: Any) -> httpx.Response:
    """One blocking call with the default client."""
    return default().run_sync(slug, **params)


def submit_async(slug: str, **params: Any) -> Job:
    """Queue a job with the default client."""
    return default().submit_async(slug, **params)
