"""The hostile table against the running server, and any bytes against the readers in process."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.requests import Request
from starlette.types import ASGIApp

from imaged.errors import ImagedError
from imaged.gateway.app import HISTORY, build_app
from imaged.gateway.compat import a1111, openai
from imaged.gateway.context import Gateway
from imaged.gateway.submit.submission import read_body
from imaged.jobs import State
from imaged.moderation.rules import HARD, Rules, _read_rule
from imaged.params import knobs
from imaged.params.image_params import read_params
from imaged.params.knobs import KNOBS
from imaged.store.jobs import queue
from tests.conftest import SLUG
from tests.contract.gate import Gate
from tests.contract.hostile import CASES, JSON, ODD_TEXTS, Case
from tests.contract.hostile_routes import OPENAI, ROUTES_CASES, SDAPI
from tests.contract.outcomes import BLOCKED
from tests.unit.test_infotext import read_back

LAST_IDS = [
    *("", "x", "é", "QUEUED", "QUEUED.0", "QUEUED.0.0.0.0", "queued.0.0.0", "QUEUED.-1.0.0"),
    *("QUEUED.٣.0.0", "QUEUED.nan.0.0", "QUEUED.1e3.0.0", "COMPLETED." + "9" * 5000 + ".0.0"),
    *("PROCESSING.999999999.999999999.999999999", "FAILED.0.0.0", "x" * 20_000, "COMPLETED.0.0.0x"),
]
PATHS = (f"/v1/{SLUG}", f"/v2/{SLUG}", OPENAI, SDAPI, "/webhook/add")
LIKELY = "acdehiklnostuxy 013458@$!|+._*-\n\u0301\u200b\u0430\u0435\uff4e\u732b"
RULES = Rules(tuple(_read_rule(line, line) for line in ("blue house", "/gr[ae]y+ +cat/", "\u732b")))
ASCII = "".join(map(chr, range(33, 127)))


def answers(gate: Gate, cases: list[Case]) -> list[str]:
    """The cases that were not answered as they should be, and how they were."""
    wrong, key = [], gate.make_key(credits=0.0, rpm=1_000_000)
    with gate.client(key) as client:
        for case in cases:
            headers = {k.encode(): v.encode() for k, v in case.headers.items()}
            url = httpx.URL(gate.url).copy_with(raw_path=quote(case.path, safe=ASCII).encode())
            try:
                answer = client.request(case.method, url, content=case.content, headers=headers)
            except httpx.TransportError as error:
                wrong.append(f"{case.name}: {type(error).__name__}")
                continue
            named = case.method == "HEAD" or answer.is_success or told(answer)
            if answer.status_code not in case.allowed or not named:
                wrong.append(f"{case.name}: {answer.status_code} {answer.text[:80]}")
        assert client.get("/v1/get-user-credits").json()["credits"] == 0.0
    return wrong


def told(answer: httpx.Response) -> bool:
    """Whether it is JSON and says what is wrong."""
    is_json = answer.headers.get("content-type") == "application/json"
    return is_json and bool(answer.json()["error"])


def test_the_hostile_table(gate: Gate) -> None:
    assert len(CASES) >= 400
    assert answers(gate, CASES) == []


def test_the_hostile_table_of_the_other_routes(gate: Gate) -> None:
    assert len(ROUTES_CASES) >= 700
    assert answers(gate, ROUTES_CASES) == []


@pytest.mark.parametrize("place", ["COMPLETED", "QUEUED"])
def test_a_hostile_last_event_id(gate: Gate, place: str) -> None:
    """What is no id of ours has seen nothing: the stream begins at its beginning."""
    job_id = gate.submit("hold" if place == "QUEUED" else "x")
    if place == "COMPLETED":
        gate.wait_for_end(job_id)
    with gate.client() as client:
        for text in LAST_IDS:
            headers = {b"last-event-id": text.encode()}
            answer = client.get(f"/v2/requests/{job_id}/events?wait=0.05", headers=headers)
            assert answer.status_code == 200, text
            assert f"id: {place}." in answer.text, text
        client.delete(f"/v2/requests/{job_id}")


PROMPTS = [json.loads(text) for text in ODD_TEXTS]
PROMPTS += ["\u0628\u064a\u062a \u05d1\u05d9\u05ea", "x\r\n\r\n<html>", "a\nNegative prompt: b"]
SMALL = {"img_width": 512, "img_height": 512}


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: repr(prompt[:12]))
def test_an_odd_prompt_makes_a_picture_and_comes_back_as_it_was(gate: Gate, prompt: str) -> None:
    """On every route that makes pictures and wherever a prompt is shown; no header has it."""
    words = {"prompt": prompt, "negative_prompt": prompt}
    body, key = {**words, **SMALL}, gate.make_key(rpm=10_000)
    with gate.client(key) as client:
        raw = client.post(f"/v1/{SLUG}", json=body)
        text = client.post(f"/v1/{SLUG}", json={**body, "base64": True})
        png = client.post(f"/v1/{SLUG}", json={**body, "output_format": "png"})
        webui = client.post(SDAPI, json=words)
        bearer = {"authorization": f"Bearer {key}"}
        other = client.post(OPENAI, json={"prompt": prompt, "size": "512x512"}, headers=bearer)
        sent = client.post(f"/v2/{SLUG}", json=body)
        job_id = sent.json()["request_id"]
        status = client.get(f"/v2/requests/{job_id}/status?wait=20")
        result, events = (client.get(f"/v2/requests/{job_id}{end}") for end in ("", "/events"))
        record, listed = client.get(f"{HISTORY}/{job_id}"), client.get(HISTORY)
        made = client.get("/inference-request/generations")
    for answer in (
        *(raw, text, png, webui, other, sent, status, result, events, record, listed, made),
    ):
        assert answer.status_code == 200, answer.text
        assert "evil" not in str(answer.headers).lower() and "html" not in str(answer.headers)
    assert raw.content[:2] == base64.b64decode(text.json()["image"])[:2] == b"\xff\xd8"
    info = json.loads(webui.json()["info"])
    shown = [result.json()["prompt"], record.json()["request_body"]["prompt"], info["prompt"]]
    shown += [webui.json()["parameters"]["prompt"], info["negative_prompt"]]
    shown += [row["request_body"]["prompt"] for row in listed.json()["data"]]
    shown += [row["prompt"] for row in made.json()["data"]]
    assert len(shown) == 17 and set(shown) == {prompt}
    for content in (png.content, base64.b64decode(webui.json()["images"][0])):
        with Image.open(io.BytesIO(content)) as image:
            found = read_back(str(image.info["parameters"]))
        assert found["Prompt"].lstrip(",").split() == prompt.lstrip(",").split()


def test_mutant_nan_body(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that take what Python's own conversions take are seen by the table."""
    numbers = [case for case in CASES if "NaN" in case.name and "=" in case.name]
    assert answers(gate, numbers) == []
    monkeypatch.setitem(knobs._READERS, "number", lambda _, value: float(value))
    monkeypatch.setitem(knobs._READERS, "integer", lambda _, value: int(value))
    wrong = answers(gate, numbers)
    assert any("guidance_scale=NaN: 406" in line for line in wrong)  # would have been queued
    assert any("=NaN: 500" in line for line in wrong)


# -- any bytes --------------------------------------------------------------------------------

BODIES_AN_EXAMPLE = 250
NAMES = [name for knob in KNOBS for name in (knob.name, *knob.aliases)]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 4, 25, 512, 1024, 2**63, 10**40, -0.0, 7.5, 1e308, 5e-324),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "25",
        "1e999",
        "NaN",
        "\0",
        "\ud800",
        "é",
        "Euler a",
        "png",
    ),
    *([], {}, [1], {"a": []}),
]
PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b'"',
    b"\\u",
    b"\\",
    b"\x00",
    b"\xff",
    b"1e9",
    b"-",
    b"NaN",
]


def bodies(
    seed: int,
    prompts: Sequence[str] = ("x",),
    fields: int = 5,
    breaks: Sequence[int] = (0, 0, 1, 2, 5),
) -> list[bytes]:
    """Objects of known names and odd values, some of them then broken at random places."""
    dice = random.Random(seed)
    found = []
    for _ in range(BODIES_AN_EXAMPLE):
        names = dice.choices(NAMES, k=dice.randrange(fields + 1))
        given = {"prompt": dice.choice(prompts), **{name: dice.choice(VALUES) for name in names}}
        content = json.dumps(given).encode()
        for _ in range(dice.choice(breaks)):
            at = dice.randrange(len(content) + 1)
            content = content[:at] + dice.choice(PIECES) + content[at + dice.randrange(3) :]
        found.append(content)
    return found


def request(content: bytes, kind: bytes) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    headers = [(b"content-type", kind)]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
    return Request(scope, receive)


async def read_all(contents: list[bytes], kind: bytes) -> tuple[int, int]:
    """How many were read and refused; anything but our own 4xx is raised."""
    read = refused = 0
    for content in contents:
        try:
            asked = request(content, kind)
            found, _ = read_params(await read_body(asked))
            json.dumps(found.as_dict(), allow_nan=False).encode()  # what the store and answers do
            read += 1
        except ImagedError as problem:
            assert problem.status is not None and 400 <= problem.status < 500
            json.dumps(problem.detail).encode()
            refused += 1
    return read, refused


@pytest.mark.parametrize("examples", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_thousands_of_bodies(examples: int) -> None:
    totals = [0, 0]

    @settings(max_examples=examples)
    @given(st.integers(0, 2**32))
    def some(seed: int) -> None:
        read, refused = asyncio.run(read_all(bodies(seed), b"application/json"))
        totals[0] += read
        totals[1] += refused

    some()
    assert sum(totals) >= examples * BODIES_AN_EXAMPLE
    assert min(totals) > sum(totals) / 20  # it exercises both


@asynccontextmanager
async def alive(app: ASGIApp) -> AsyncIterator[None]:
    """From its start to its shutdown, as a server tells an app of them."""
    told: asyncio.Queue[Any] = asyncio.Queue()
    said: asyncio.Queue[Any] = asyncio.Queue()
    running = asyncio.ensure_future(app({"type": "lifespan"}, told.get, said.put))
    await told.put({"type": "lifespan.startup"})
    assert (await said.get())["type"] == "lifespan.startup.complete"
    yield
    await told.put({"type": "lifespan.shutdown"})
    await running


async def through(app: ASGIApp, key: str, contents: Iterator[bytes]) -> list[httpx.Response]:
    """The answers to these bodies at every route that takes some; none is the server's fault."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    headers, seen = {"x-api-key": key, **JSON}, []
    async with alive(app), httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        for n, content in enumerate(contents):
            answer = await http.post(PATHS[n % len(PATHS)], content=content, headers=headers)
            late = answer.status_code == 504 and "still running" in answer.text
            fine = answer.status_code == 200 or (told(answer) and answer.status_code < 500)
            assert fine or late, (n, content, answer.text)
            seen.append(answer)
            if answer.status_code == 200:
                job_id = answer.json()["request_id"]
                for path in (f"/v2/requests/{job_id}", f"{HISTORY}/{job_id}"):
                    assert (await http.get(path, headers=headers)).status_code == 200, content
    return seen


@pytest.mark.parametrize("seeds", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_bodies_of_one_who_cannot_pay(tmp_path: Path, seeds: int) -> None:
    """In process, from the guards to the store, under a key that can pay for nothing."""
    (tmp_path / "data").mkdir()
    idle = Gate(tmp_path / "data")
    key = idle.make_key(credits=0.0, rpm=1_000_000)
    seen = Counter(
        a.status_code
        for a in asyncio.run(
            through(
                build_app(Gateway.open(idle.settings)),
                key,
                (c for seed in range(seeds) for c in bodies(seed)),
            )
        )
    )
    idle.database.close()
    assert seen.total() == seeds * BODIES_AN_EXAMPLE
    assert seen[400] > 25 * seeds and seen[406] > 10 * seeds and seen[429] > 5 * seeds
    assert not seen[200]


@pytest.mark.parametrize("seeds", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_bodies_of_one_who_can_pay(tmp_path: Path, seeds: int) -> None:
    """What is taken is a job, which reads back from the store; nobody works, so none ends."""
    (tmp_path / "data").mkdir()
    idle = Gate(tmp_path / "data", wait_s=0.0)
    key = idle.make_key(credits=1e6, rpm=100_000_000)
    likely = (
        c for seed in range(seeds) for c in bodies(seed, PROMPTS, fields=2, breaks=(0, 0, 0, 1))
    )
    seen = asyncio.run(through(build_app(Gateway.open(idle.settings)), key, likely))
    with idle.database.read() as c:
        jobs = queue.newest(c, 5000)
    idle.database.close()
    codes = Counter(answer.status_code for answer in seen)
    ids = {answer.json()["request_id"] for answer in seen if answer.status_code == 200}
    assert len(seen) == seeds * BODIES_AN_EXAMPLE
    assert codes[200] > 12 * seeds and codes[504] > 50 * seeds, codes
    assert len(jobs) == codes[200] + codes[504] and ids <= {job.id for job in jobs}
    assert {job.state for job in jobs} == {State.QUEUED}


@pytest.mark.parametrize("examples", [300, pytest.param(1500, marks=pytest.mark.slow)])
def test_any_prompt_is_judged(examples: int) -> None:
    """Rules of both kinds, on any text: a verdict, the same one twice, and no error."""

    @settings(max_examples=examples)
    @given(st.text() | st.text(alphabet=LIKELY))
    def one(text: str) -> None:
        verdict = RULES.judge(text)
        assert verdict in (None, HARD, *(rule.name for rule in RULES.listed))
        assert RULES.judge(text) == verdict
        assert RULES.judge(f"{text}, {BLOCKED}") == HARD

    one()


@settings(max_examples=300)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"application/json", b"multipart/form-data; boundary=b"]),
)
def test_any_bytes(content: bytes, kind: bytes) -> None:
    around = [content, b"--b\r\n" + content + b"\r\n--b--", b'{"prompt": "x", ' + content + b"}"]
    asyncio.run(read_all(around, kind))


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
THEIRS = st.dictionaries(
    st.sampled_from(
        [
            *("prompt", "n", "size", "model", "quality", "stream", "background", "response_format"),
            *("sampler_name", "scheduler", "batch_size", "n_iter", "eta", "override_settings"),
            *("alwayson_scripts", "styles", "enable_hr", "cfg_scale", "seed", "steps", "width"),
        ]
    ),
    JSONS,
    max_size=5,
)


@pytest.mark.parametrize("examples", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_any_words_of_the_other_dialects(examples: int) -> None:
    from imaged.gateway.compat import shared

    @settings(max_examples=examples)
    @given(THEIRS)
    def one(words: dict[str, Any]) -> None:
        for neutral, read in (
            (openai.UNSUPPORTED_FIELDS, openai._params),
            (a1111.UNSUPPORTED_FIELDS, a1111._params),
        ):
            try:
                shared.refuse_unless(words, neutral)
                a1111._no_scripts(words)
                a1111._slug(words)
                read(words)
            except ImagedError as problem:
                assert problem.status == 400

    one()
