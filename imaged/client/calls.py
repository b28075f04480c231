"""Every call built and every answer read; no I/O, shared by both clients.

What may be sent again: reads and cancels, and a submit that carries an Idempotency-Key, which
makes the second a repetition of the first. Nothing else is ever sent twice.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
from httpx_retries import Retry, RetryTransport

from imaged.errors import BadAddress, ImagedError, NoAnswer

DEFAULT_URL = "http://127.0.0.1:8000"
INTERVAL_S = 1.0
TIMEOUT_S = 600.0
FINAL = ("COMPLETED", "FAILED")

LOST = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)
READS = Retry(
    total=4,
    backoff_factor=0.2,
    allowed_methods=("GET", "HEAD", "DELETE"),
    status_forcelist=(502, 503),
    retry_on_exceptions=LOST,
    total_timeout=30,
)
SUBMITS = Retry(
    total=4,
    backoff_factor=0.2,
    allowed_methods=("POST",),
    status_forcelist=(502, 503),
    retry_on_exceptions=LOST,
    total_timeout=30,
)


def transport() -> RetryTransport:
    """Sends reads again when they were lost on the way."""
    return RetryTransport(retry=READS)


@contextmanager
def answered() -> Iterator[None]:
    """Raises NoAnswer for whatever goes wrong between a request and its answer, and BadAddress
    for a request that has no URL.
    """
    try:
        yield
    except httpx.InvalidURL as error:
        raise BadAddress(f"this cannot be asked for: {error}") from error
    except httpx.RequestError as error:
        raise NoAnswer(
            f"no answer from {_asked(error)}: {error or type(error).__name__}"
        ) from error


def _asked(error: httpx.RequestError) -> str:
    """The server that a failed request was for; of its URL only what holds no password."""
    try:
        url = error.request.url
    except RuntimeError:  # it was not told
        return "the server"
    return f"{url.scheme}://{url.netloc.decode()}"


def submit(params: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a submit's POST: its body, and the header that lets it be sent again."""
    return {
        "json": dict(params),
        "headers": {"idempotency-key": uuid.uuid4().hex},
        "extensions": {"retry": SUBMITS},
    }


def origin(url: str | None) -> str:
    """The server's origin from an argument, IMAGED_URL or the default; a final /v1 may stand.

    Raises BadAddress, which does not repeat what was given: there may be a password in it.
    """
    text = (url or os.environ.get("IMAGED_URL") or DEFAULT_URL).strip().rstrip("/")
    if not _is_address(text):
        raise BadAddress(
            f"{'base_url' if url else 'IMAGED_URL'} should be http:// or https://, a host and "
            f"perhaps a port, such as {DEFAULT_URL}"
        )
    return text.removesuffix("/v1").removesuffix("/v2")


def _is_address(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    named = url.scheme in ("http", "https") and url.host and "%" not in url.host
    whole = not url.query and not url.fragment and (url.port is None or 0 < url.port < 65536)
    return bool(named and whole)


def headers(api_key: str | None) -> dict[str, str]:
    """The key from an argument, IMAGED_API_KEY or SEGMIND_API_KEY; without one none is sent."""
    key = api_key or os.environ.get("IMAGED_API_KEY") or os.environ.get("SEGMIND_API_KEY")
    return {"x-api-key": key} if key else {}


def connection(api_key: str | None, base_url: str | None, timeout: float) -> dict[str, Any]:
    """What httpx.Client and httpx.AsyncClient are made with."""
    return {
        "base_url": origin(base_url),
        "headers": headers(api_key),
        "timeout": timeout,
        "transport": transport(),
    }


def body_of(response: httpx.Response) -> dict[str, Any]:
    """A JSON object, of success or of a job that ended; anything else raises ImagedError."""
    body = _object(response)
    if response.is_success or body.get("status") in FINAL:
        return body
    raise problem(response)


def finish(samples: Sequence[int] | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The body that has pictures of a draft go on."""
    return {"json": {**({} if samples is None else {"samples": list(samples)}), **changes}}


def rests(body: Mapping[str, Any]) -> bool:
    """Whether a status body is of a draft that waits for `finish`."""
    return bool(body.get("progress", {}).get("parked"))


def wait_is_over(body: Mapping[str, Any]) -> bool:
    """Whether a job has ended; raises ImagedError for one that will not by itself."""
    refuse_draft(body)
    return body["status"] in FINAL


def refuse_draft(body: Mapping[str, Any]) -> None:
    """Raises ImagedError: who waits for the end of a draft that rests would wait for ever."""
    if rests(body):
        raise ImagedError("the job rests as a draft: look at draft(), then call finish()")


def problem(response: httpx.Response) -> ImagedError:
    """What the server refused, as an error with its text, status and code."""
    body = _object(response)
    detail = body.get("error") or f"the server answered {response.status_code}"
    error = ImagedError(str(detail), status=response.status_code)
    error.code = str(body.get("code", error.code))
    return error


def submitted(body: Mapping[str, Any]) -> tuple[str, str, str]:
    """request_id, status_url and response_url of a submit's answer."""
    try:
        return body["request_id"], body["status_url"], body["response_url"]
    except KeyError as missing:
        raise ImagedError(f"the server's answer lacks {missing}") from None


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
