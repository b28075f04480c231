"""The operator's check of finished images: a function or a service of theirs; none is included.

IMAGED_CHECKER names one of
- `package.module:callable`, called with (rgb: bytes, width: int, height: int), which answers None
  to allow the picture or a str, the reason, to refuse it;
- `http://...` or `https://...` on the operator's network: the JPEG is posted there and the answer
  is 200 with `{"allowed": true}` or `{"allowed": false, "reason": "..."}`.

It fails closed: on any error, or without an answer in time, the image is not shown.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import re
import ssl
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx

from imaged.errors import CommandError, JobFailed
from imaged.worker.daemon import in_daemon

if TYPE_CHECKING:  # the gateway's process loads this too, without torch
    from imaged.engine.decode import Picture

log = logging.getLogger(__name__)

#: An image and its JPEG -> the reason to refuse it, or None.
Check = Callable[["Picture", bytes], str | None]

TIMEOUT_S = 10.0  # of a service's whole answer
LOCAL_TIMEOUT_S = 60.0  # of a function, which may run a net of its own
MAX_REPLY_BYTES = 65_536  # bytes
MAX_REASON_LENGTH = 200
_LOCAL = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def load_check(setting: str) -> Check | None:
    """The checker that a setting names, or None if it is empty; raises CommandError."""
    if not setting:
        return None
    if setting.startswith(("http://", "https://")):
        return _service(setting)
    if not _LOCAL.fullmatch(setting):
        raise CommandError("IMAGED_CHECKER should be package.module:callable or an http(s) URL")
    return _local(setting)


def judge(check: Check | None, picture: Picture, jpeg: bytes) -> None:
    """Raises JobFailed if the image is refused, or if the checker fails."""
    if check is None:
        return
    try:
        reason = check(picture, jpeg)
        if reason is not None and not isinstance(reason, str):
            raise TypeError(f"it answered with {type(reason).__name__}, not str or None")
    except Exception:  # fail closed
        log.exception("the image checker failed")
        raise JobFailed("checker_unavailable", "the picture could not be checked") from None
    if reason is not None:
        raise JobFailed("content_policy", _refusal(reason))


def _refusal(reason: str) -> str:
    shown = "".join(c if c.isprintable() else " " for c in reason)[:MAX_REASON_LENGTH].strip()
    return "The picture was refused by the content policy" + (f": {shown}" if shown else ".")


def _local(setting: str) -> Check:
    module, _, name = setting.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # an import runs their code
        raise CommandError(f"IMAGED_CHECKER: {setting} cannot be loaded: {error!r}") from error
    if not callable(found):
        raise CommandError(f"IMAGED_CHECKER: {setting} is not callable")
    return lambda picture, _: _in_time(partial(found, picture.rgb, picture.width, picture.height))


def _in_time(call: Callable[[], Any]) -> Any:
    """The call's result; TimeoutError after LOCAL_TIMEOUT_S. A thread cannot be killed: one that
    hangs is left behind.
    """
    return in_daemon("checker", call).result(LOCAL_TIMEOUT_S)


def _service(url: str) -> Check:
    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL as error:
        raise CommandError(f"IMAGED_CHECKER is no URL: {error}") from None
    if not host:
        raise CommandError("IMAGED_CHECKER should name a host")
    trusted = ssl.create_default_context()

    def check(_: Picture, jpeg: bytes) -> str | None:
        return asyncio.run(asyncio.wait_for(_ask(url, jpeg, trusted), TIMEOUT_S))

    return check


async def _ask(url: str, jpeg: bytes, trusted: ssl.SSLContext) -> str | None:
    headers = {"content-type": "image/jpeg", "accept-encoding": "identity"}
    async with (
        httpx.AsyncClient(verify=trusted, trust_env=False, timeout=TIMEOUT_S) as client,
        client.stream("POST", url, content=jpeg, headers=headers) as answer,
    ):
        if answer.status_code != 200:
            raise ValueError(f"it answered {answer.status_code}")
        body = bytearray()
        async for part in answer.aiter_raw(16_384):
            body += part
            if len(body) > MAX_REPLY_BYTES:
                raise ValueError(f"it answered with more than {MAX_REPLY_BYTES} bytes")
    return _read(json.loads(body))


def _read(verdict: Any) -> str | None:
    allowed = verdict.get("allowed") if isinstance(verdict, dict) else None
    if not isinstance(allowed, bool):
        raise ValueError('it should answer with {"allowed": true} or {"allowed": false}')
    reason = verdict.get("reason")
    return None if allowed else (reason if isinstance(reason, str) else "")
