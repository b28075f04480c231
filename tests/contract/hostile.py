"""Requests that nobody should send: for each, what must be answered. Made by hand, field by
field and byte by byte; never a status of 500 or more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.conftest import SLUG

JSON = {"content-type": "application/json"}
KEEP = object()


@dataclass(frozen=True)
class Case:
    """One request and the statuses that are right for it, from a key without credits: 406 means
    that the request itself was fine.
    """

    name: str
    allowed: tuple[int, ...]
    content: bytes = b""
    method: str = "POST"
    path: str = f"/v2/{SLUG}"
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))


BAD_NUMBERS = [
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400, "9" * 5000),
    *("-1e308", "18446744073709551616", "-9223372036854775809", "1e-400", "0.1", "true", "false"),
    *('"NaN"', '"inf"', '"1e999"', '"0x10"', '"１２"', '"1_0"', '"--5"', '"5 6"', '"5\\u0000"'),
    *('"\\ud800"', '""', '"x"', "[]", "[5]", "{}", '{"$gt": 0}', '"' + "9" * 500 + '"'),
]
FINE_ONCE = {("seed", "1e-400"), ("seed", '"NaN"')}
BAD_TEXTS = [
    *(
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"a\\u0000b"',
        "5",
        "true",
        "[]",
        "{}",
        '"' + "x" * 20_001 + '"',
    ),
    *("1e5", '["a"]', '{"a": 1}', '"\\u0000"', "NaN"),
]
ODD_TEXTS = [
    *(
        '"\\u200b\\u200b"',
        '"\\u202etxt"',
        '"\\ufeff x"',
        '"a,' + "," * 15_000 + '"',
        '"' + "(" * 5000 + '"',
    ),
    *(
        '"e\\u0301' + "\\u0301" * 2000 + '"',
        '"\\uffff"',
        '"<script>alert(1)</script>"',
        '"%s%n{}${x}"',
    ),
    *('"\'; DROP TABLE jobs; --"', '"../../etc/passwd"', '"\\ud83d\\ude00"', '"\\r\\nX-Evil: 1"'),
]
BAD_CHOICES = [
    '"Euler z"',
    '""',
    "5",
    "null5",
    "[]",
    "{}",
    "true",
    '"euler\\u0000"',
    '"' + "E" * 9000 + '"',
]
BAD_BOOLEANS = ['"yes"', "2", "-1", "0.5", "[]", "{}", '""', '"nul"', "NaN", '"\\ud800"', "1e999"]
NUMERIC = ("samples", "num_inference_steps", "guidance_scale", "seed", "img_width", "img_height")
ALIASES = ("steps", "guidance", "width", "height", "cfg_scale")


def of(field_name: str, text: str) -> bytes:
    prompt = "" if field_name == "prompt" else '"prompt": "x", '
    return f'{{{prompt}"{field_name}": {text}}}'.encode()


def fields() -> Iterator[Case]:
    for name in (*NUMERIC, *ALIASES):
        for text in BAD_NUMBERS:
            zero = text in ("1e-400",)
            whole = (name == "guidance_scale" and text == "1") or (zero and name == "seed")
            yield Case(f"{name}={text[:24]}", (406,) if whole else (400,), of(name, text))
    for name in ("prompt", "negative_prompt", "negativePrompt"):
        for text in BAD_TEXTS:
            yield Case(f"{name}={text[:24]}", (400,), of(name, text))
        for text in ODD_TEXTS:
            yield Case(f"{name}={text[:24]}", (406,), of(name, text))
    for name in ("scheduler", "output_format"):
        for text in BAD_CHOICES:
            yield Case(f"{name}={text[:24]}", (400,), of(name, text))
    for text in BAD_BOOLEANS:
        yield Case(f"base64={text[:24]}", (400,), of("base64", text))
    for text in ('"  "', '""', '"\\t\\n"'):
        yield Case(f"prompt={text}", (400,), of("prompt", text))


def bodies() -> Iterator[Case]:
    broken = [
        *(
            b"",
            b"{",
            b"}",
            b"[]",
            b"null",
            b"true",
            b"5",
            b'"x"',
            b"{]",
            b"{'prompt': 'x'}",
            b"prompt=x",
        ),
        *(
            b"\xff\xfe{\x00",
            b"\x00",
            b"\xef\xbb\xbf",
            b"{" * 100_000,
            b"[" * 100_000,
            b'{"a":' * 50_000,
        ),
        *(
            b'{"prompt": "x"',
            b'{"prompt": "x",}',
            b'{"prompt": "\x01"}',
            b'{"prompt": "\\x"}',
            b"NaN",
        ),
        *(
            b'{"prompt": "x"} {}',
            b'{"prompt": "\xff"}',
            b'{"prompt": "\xed\xa0\x80"}',
            b"{}" * 1000,
        ),
    ]
    for n, content in enumerate(broken):
        yield Case(f"broken {n} {content[:16]!r}", (400,), content)
    doubled = ("prompt", "samples", "seed", "img_width", "base64", "scheduler")
    for name in doubled:
        value = '"x"' if name in ("prompt", "scheduler") else "1"
        yield Case(f"{name} twice", (400,), f'{{"{name}": {value}, "{name}": {value}}}'.encode())
    wide = json.dumps({"prompt": "x", **{f"f{k}": k for k in range(5000)}})
    deep = '{"prompt": "x", "deep": ' + "[" * 500 + "]" * 500 + "}"
    names = json.dumps({"prompt": "x", "y" * 50_000: 1, "": 2, "\ud800": 3, "a\u0000b": 4})
    for name, text in (
        ("wide", wide),
        ("deep", deep),
        ("names", names),
        ("big", " " * 200_000 + '{"prompt": "x"}'),
    ):
        yield Case(name, (406,), text.encode())
    for size in (262_145, 1_000_000, 5_000_000):
        yield Case(f"{size} bytes", (413,), b"x" * size)
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonx",
        "",
        "*/*",
        "é",
        ";",
        "a/b;" * 500,
    ):
        headers = {"content-type": kind}
        yield Case(f"type {kind[:20]}", (406,), b'{"prompt": "x"}', headers=headers)


def forms() -> Iterator[Case]:
    field_of = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    head = {"content-type": "multipart/form-data; boundary=b"}
    prompt = field_of % (b"prompt", b"", b"x")
    parts: list[tuple[str, bytes, int]] = [
        ("fine", prompt + b"--b--", 406),
        ("nothing", b"", 400),
        ("no end", prompt, 400),
        ("no name", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--", 400),
        ("no disposition", b"--b\r\n\r\nx\r\n--b--", 400),
        ("a file", field_of % (b"prompt", b'; filename="a.txt"', b"x") + b"--b--", 400),
        ("twice", prompt + prompt + b"--b--", 400),
        ("bad utf-8", field_of % (b"prompt", b"", b"\xff\xfe") + b"--b--", 406),
        ("a NUL", field_of % (b"prompt", b"", b"a\x00b") + b"--b--", 400),
        ("NaN", prompt + field_of % (b"seed", b"", b"NaN") + b"--b--", 400),
        (
            "many",
            prompt + b"".join(field_of % (b"f%d" % k, b"", b"") for k in range(200)) + b"--b--",
            400,
        ),
        ("long head", b"--b\r\nX: " + b"y" * 50_000 + b"\r\n\r\nx\r\n--b--", 400),
        ("colons", b"--b\r\n:::\r\n\r\nx\r\n--b--", 400),
    ]
    for name, content, status in parts:
        yield Case(f"form {name}", (status,), content, headers=head)
    for kind in (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary="',
    ):
        yield Case(kind, (400,), prompt + b"--b--", headers={"content-type": kind})


def paths() -> Iterator[Case]:
    ids = [
        "%00",
        "%ff%fe",
        "..%2f..",
        "x" * 5000,
        "a" * 32 + "%0a",
        "é",
        "'",
        "%F0%9F%98%80",
        " ",
        "*",
    ]
    for job_id in ids:
        for path in (
            f"/v2/requests/{job_id}",
            f"/v2/requests/{job_id}/status",
            f"/v1/requests/{job_id}",
        ):
            yield Case(path[:60], (400, 404), method="GET", path=path, headers={})
    for wait in ("nan", "inf", "-1", "61", "1e999", "%00", "x", "1,5", "0x1"):
        path = f"/v2/requests/{'0' * 32}/status?wait={wait}"
        yield Case(f"wait={wait}", (400,), method="GET", path=path, headers={})
    for slug in ("%00", "..", "%2e%2e", "A" * 3000, "sdxl%ff", "é", "%7B%7D", ".", "requests", "'"):
        for version in ("v1", "v2"):
            yield Case(f"{version} {slug[:20]}", (404, 405), b"{}", path=f"/{version}/{slug}")
    for name in ("x", "%00", "../secret", "..%2fsecret", "0" * 32 + "-1-0.jpeg", "-1-0.png"):
        for query in (
            "",
            "?exp=1&sig=",
            "?exp=9999999999&sig=%ff",
            "?exp=١&sig=é",
            "?exp=" + "9" * 5000,
        ):
            yield Case(
                f"file {name} {query[:12]}",
                (400, 404),
                method="GET",
                path=f"/files/{name}{query}",
                headers={},
            )
    for method in ("PUT", "PATCH", "OPTIONS", "TRACE", "GET", "HEAD"):
        yield Case(f"{method} a model", (405,), method=method, path=f"/v1/{SLUG}", headers={})


CASES = [*fields(), *bodies(), *forms(), *paths()]
