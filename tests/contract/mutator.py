"""Bodies for every POST route, made from good ones by seeded dice: values of other kinds, numbers
beyond all bounds, odd texts, fields that are missing, doubled or unknown, bytes that are changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from tests.conftest import SLUG
from tests.contract.hostile import BAD_NUMBERS, BAD_TEXTS, ODD_TEXTS
from tests.contract.hostile_routes import OPENAI, SDAPI, TYPES, URLS
from tests.contract.outcomes import BLOCKED

Fields = list[tuple[str, str]]  # names and values as they stand in the JSON

IMAGE = {"prompt": "a house", "negative_prompt": "rain", "samples": 1, "num_inference_steps": 20}
IMAGE |= {"guidance_scale": 7.5, "seed": 5, "img_width": 512, "img_height": 1024, "base64": False}
WORDS = {"scheduler": "Euler a", "output_format": "png"}
HOOK: dict[str, object] = {
    "webhook_url": "https://example.com/x",
    "event": {"types": ["GENERATION"]},
}
GOOD: dict[str, list[dict[str, object]]] = {
    f"/v1/{SLUG}": [{**IMAGE, **WORDS}, {"prompt": "x"}, {"prompt": BLOCKED}],
    f"/v2/{SLUG}": [{**IMAGE, **WORDS}, {"prompt": "x"}, {"prompt": BLOCKED}],
    "/v2/micro": [{"prompt": "x", "steps": 20, "width": 512, "height": 512, "cfg_scale": 3}],
    OPENAI: [
        {"prompt": "a house", "n": 2, "size": "512x512", "model": SLUG, "quality": "high"},
        {"prompt": "x", "response_format": "b64_json", "background": "opaque", "user": "u"},
    ],
    SDAPI: [
        {"prompt": "a house", "negative_prompt": "", "steps": 20, "cfg_scale": 7, "seed": -1},
        {"prompt": "x", "sampler_name": "DPM++ 2M", "scheduler": "karras", "batch_size": 2},
        {"prompt": "x", "override_settings": {"sd_model_checkpoint": SLUG}, "styles": []},
    ],
    "/webhook/add": [HOOK],
    "/webhook/update": [{**HOOK, "webhook_id": "0" * 32}],
}
ODD = [
    *(*BAD_NUMBERS, *BAD_TEXTS, *ODD_TEXTS, "null", "0", "1", "25", "-0.0", "1E5", "[]", "{}"),
    *("[" * 900 + "]" * 900, '{"a":' * 400 + "1" + "}" * 400, "[1,[2,{}]]", '"\\u202e\\u0000"'),
    *('"' + "\U0001f600" * 300 + '"', '"\u0130\u017f\u212a"', '"' + "a\u0300" * 200 + '"'),
    *(json.dumps(value) for value in (*URLS, *TYPES)),
]
PIECES = [*(b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"\\ud800", b"\x00", b"\xff", b"\xc3")]
PIECES += [
    b"NaN",
    b"1e999",
    b"-",
    b"null",
    b"\xed\xa0\x80",
    b"\r\n",
    b"\xef\xbb\xbf",
    b'"prompt":"y",',
]
KINDS = ["application/json"] * 40 + ["application/json; charset=utf-8", "text/plain", "", "\xe9"]
REPEATS = [f"word-{n}" for n in range(200)]


@dataclass(frozen=True)
class Sent:
    path: str
    content: bytes
    headers: dict[str, str]


def mutants(count: int, seed: int) -> Iterator[Sent]:
    """So many requests, the same for the same seed, to all routes in turns."""
    dice, paths = Random(seed), list(GOOD)
    for n in range(count):
        path = paths[n % len(paths)]
        fields = [(k, json.dumps(v)) for k, v in dice.choice(GOOD[path]).items()]
        for _ in range(dice.choice((0, 1, 2, 3, 4, 6))):
            fields = _changed(fields, dice)
        kind = dice.choice(KINDS)
        if path.startswith("/v") and not dice.randrange(12):
            kind, content = "multipart/form-data; boundary=b", _form(fields)
        else:
            text = "{" + ", ".join(f'"{name}": {value}' for name, value in fields) + "}"
            content = text.encode()
        for _ in range(dice.choice((0, 0, 1, 1, 2, 3))):
            content = _broken(content, dice)
        repeats = {} if dice.randrange(20) else {"idempotency-key": dice.choice(REPEATS)}
        yield Sent(path, content, {"content-type": kind, **repeats})


def _changed(fields: Fields, dice: Random) -> Fields:
    """With one field that is another, gone, twice there or new."""
    if not fields:
        return [("prompt", dice.choice(ODD))]
    at = dice.randrange(len(fields))
    (name, value), rest = fields[at], fields[:at] + fields[at + 1 :]
    how = dice.randrange(8)
    if how < 4:
        return [*rest, (name, dice.choice(ODD))]
    if how == 4:
        return rest
    if how == 5:
        return [*fields, (name, dice.choice((value, dice.choice(ODD))))]
    if how == 6:
        return [*fields, (dice.choice(("", "x", name.upper(), "\u0130", "a" * 300)), value)]
    other = dice.randrange(len(fields))  # two change their values
    return [*rest, (name, fields[other][1])]


def _form(fields: Fields) -> bytes:
    part = '--b\r\nContent-Disposition: form-data; name="{}"\r\n\r\n{}\r\n'
    text = "".join(part.format(name, value.strip('"')) for name, value in fields)
    return text.encode() + b"--b--\r\n"


def _broken(content: bytes, dice: Random) -> bytes:
    """With a bit turned, a piece put in or taken out, or its end lost."""
    if not content:
        return dice.choice(PIECES)
    at, how = dice.randrange(len(content)), dice.randrange(4)
    if how == 0:
        turned = content[at] ^ (1 << dice.randrange(8))
        return content[:at] + bytes([turned]) + content[at + 1 :]
    if how == 1:
        return content[:at] + dice.choice(PIECES) + content[at:]
    if how == 2:
        return content[:at] + content[at + dice.randrange(1, 9) :]
    return content[:at]
