"""Requests that nobody should send, to the routes beside v1 and v2: webhooks, the other dialects,
the history; and the three headers that say how a job is to be handled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.conftest import SLUG
from tests.contract.hostile import JSON, Case, of

OPENAI, SDAPI = "/openai/v1/images/generations", "/sdapi/v1/txt2img"
POSTS = ("/webhook/add", "/webhook/update", OPENAI, SDAPI, f"/v2/{SLUG}/preflight")
BROKEN = [
    *(b"", b"{", b"[]", b"null", b"5", b'"x"', b"NaN", b"\xff\xfe{\x00", b"\xef\xbb\xbf{}"),
    *(b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": "\xff"}', b'{"prompt": "x",}', b"{} {}"),
]
URLS = [
    *("", "x", "//x", "ftp://example.com/", "file:///etc/passwd", "javascript:alert(1)", "http:"),
    *("http://", "http:///x", "http://127.0.0.1/", "http://[::1]/", "http://0/", "http://0x7f.1/"),
    *("http://2130706433/", "http://127.1/", "http://169.254.169.254/latest"),
    *("http://[::ffff:127.0.0.1]/", "http://10.0.0.1/", "http://a@example.com/", "http://a b/"),
    *("http://example.com:22/", "http://example.com:99999/", "http://example.com:x/", "http://[/"),
    *("http://example.com\\@127.0.0.1/", "http://exa\u0000mple.com/", "http://é.example/\ud800"),
    *("https://" + "a" * 5000 + ".example/", "https://%00/", "https://..../", "https://-/\r\nx: 1"),
]
TYPES: list[Any] = [
    *(None, "GENERATION", 5, [], {}, [None], [[]], [{}], [""], ["PIXELFLOW"], ["GENERATION\0"]),
    *(["\ud800"], ["GENERATION"] * 2 + ["x"], {"GENERATION": 1}, True, [1e308], ["x" * 10_000]),
]
IDS: list[Any] = [None, 5, "", "x", "\0", "é", "\ud800", [], {}, True, "a" * 5000, "../x", "%00"]
ODD = [
    *("NaN", "1e999", "-1e999", "true", "[]", "{}", '"\\ud800"', '"\\u0000"', "9" * 5000, "[[[]]]"),
    *('"x"', '"' + "9" * 500 + '"', "-1", "1e-400", '""', '{"a": NaN}', '[null, {"": []}]'),
]
OPENAI_FIELDS = ("n", "size", "model", "response_format", "quality", "stream", "background")
SDAPI_FIELDS = (
    *("steps", "cfg_scale", "width", "height", "seed", "batch_size", "n_iter", "sampler_name"),
    *("scheduler", "eta", "styles", "alwayson_scripts", "override_settings", "enable_hr"),
)
DAYS = ("", "yesterday", "0000-00-00", "2026-02-30", "٢٠٢٦-01-01", "%00", "1" * 5000)
NUMBERS = ("", "0", "-1", "nan", "1e3", "9" * 5000, "٣", "%00", "1,5", " 5", "0x1", "1_0")
SEARCHES: dict[str, dict[str, tuple[str, ...]]] = {
    "/v1/schedulers": {
        "steps": (*NUMBERS, "151"),
        "profile": ("", "x", "%00", "A1111"),
    },
    "/inference-request/generations": {
        "page": NUMBERS,
        "start_date": DAYS,
        "end_date": (*DAYS, "9999-12-31"),
        "user_id": ("", "x", "%00", "5e3", "9" * 5000),
    },
    "/inference-request/request-history": {
        "page": NUMBERS,
        "per_page": (*NUMBERS, "101"),
        "from_date": DAYS,
        "to_date": (*DAYS, "9999-12-31"),
        "status": ("", "DONE", "%00", "completed"),
        "sort_by": ("", "id", "key_id;--", "%00"),
        "sort_order": ("", "up", "DESC", "%ff"),
    },
    "/inference-request/recent-generations": {"model_name": ("",)},
}
NAMES = ("%00", "%ff%fe", "%25", "'--", "x" * 5000, "é", "_", "%F0%9F%98%80", "\\")
IDEMPOTENCY = ("", "a b", "é", "x" * 256, "a\tb", "\u202e", "x" * 5000)
CANCEL = ("", "0", "-1", "nan", "inf", "1e3", "86401", "9" * 5000, "0x10", "1,5", "٣", "5 s", "+1")


def webhooks() -> Iterator[Case]:
    good = {"webhook_url": "https://example.com/", "event": {"types": ["GENERATION"]}}
    urls: list[Any] = [*URLS, None, 5, [], {}, True]
    for url in urls:
        yield _json("/webhook/add", {**good, "webhook_url": url}, (400,))
    for types in TYPES:
        for event in ({"types": types}, types):
            yield _json("/webhook/add", {**good, "event": event}, (400,))
    for webhook_id in IDS:
        status = 404 if isinstance(webhook_id, str) else 400
        yield _json("/webhook/update", {**good, "webhook_id": webhook_id}, (status,))
    for webhook_id in ("", "%00", "%ff", "x" * 5000, "é", "'--"):
        for path in ("/webhook/inactive", "/webhook/dispatch-logs"):
            yield _get(f"{path}?webhook_id={webhook_id}", (404,))


def dialects() -> Iterator[Case]:
    for path, names in ((OPENAI, OPENAI_FIELDS), (SDAPI, SDAPI_FIELDS)):
        for name in ("prompt", "negative_prompt"):
            for text in ("5", "[]", "{}", "true", '"\\ud800"', '"a\\u0000b"', "NaN"):
                yield Case(f"{path} {name}={text}", (400,), of(name, text), path=path)
        for name in names:
            for text in ODD:  # some ask for nothing that is not there, and then it is the money
                poor = 429 if path == OPENAI else 406
                yield Case(
                    f"{path} {name}={text[:20]}", (400, 404, poor), of(name, text), path=path
                )
    for slug in NAMES:
        yield _get(f"/openai/v1/models/{slug}", (404,))


def broken() -> Iterator[Case]:
    for path in POSTS:
        for n, content in enumerate(BROKEN):
            yield Case(f"{path} broken {n}", (400,), content, path=path)
        for kind in ("", "text/plain", "multipart/form-data; boundary=b", "é"):
            forms = path in POSTS[4:] and kind.startswith("multipart")
            given = {"content-type": kind}
            allowed = (400,) if forms else (406,)  # who takes forms finds none in it
            yield Case(f"{path} type {kind}", allowed, b"{}", path=path, headers=given)
        yield Case(f"{path} large", (413,), b"x" * 300_000, path=path)
        for verb in ("GET", "PUT", "DELETE", "PATCH"):
            yield Case(f"{verb} {path}", (405,), method=verb, path=path, headers={})


def history() -> Iterator[Case]:
    for path, fields in SEARCHES.items():
        for name, values in fields.items():
            for value in values:
                yield _get(f"{path}?{name}={value}", (400,))
        for name in NAMES:
            yield _get(f"{path}?model_name={name}", (200,))
            yield _get(f"{path}?{name}={name}", (200,) if "recent" not in path else (400,))
    for name in NAMES:
        yield _get(f"/inference-request/request-history/{name}", (404,))
        yield _get(f"/v1/schedulers?model={name}", (404,))


def headers() -> Iterator[Case]:
    for path in (f"/v1/{SLUG}", f"/v2/{SLUG}", OPENAI, SDAPI):
        for name, values in (("Idempotency-Key", IDEMPOTENCY), ("Cancel-After", CANCEL)):
            for value in values:
                given = {**JSON, name: value}
                yield Case(
                    f"{path} {name}: {value[:9]}", (400,), b'{"prompt": "x"}', "POST", path, given
                )


def _json(path: str, body: Any, allowed: tuple[int, ...]) -> Case:
    content = json.dumps(body).encode()
    return Case(f"{path} {content[:60]!r}", allowed, content, path=path)


def _get(path: str, allowed: tuple[int, ...]) -> Case:
    return Case(path[:70], allowed, method="GET", path=path, headers={})


ROUTES_CASES = [*webhooks(), *dialects(), *broken(), *history(), *headers()]
