"""The way of one request: the modules of ours that it passes from its route to its row in the
queue, and on to its picture; and what is done once on it.
"""

from __future__ import annotations

import asyncio
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import httpx
import pytest

import imaged
from imaged.gateway.app import build_app
from imaged.gateway.context import Gateway
from imaged.prompt import Prompt, a1111
from imaged.settings import Settings
from imaged.store.accounts import keys
from tests.conftest import SLUG, store
from tests.engine.test_worker import working
from tests.mutants import red

PACKAGE = Path(imaged.__file__).parent
TOUR = PACKAGE.parent / "docs/follow-one-image.md"
MOST = 21  # modules from the route to the row
BODY = {"prompt": "a [red|blue] house", "width": 512, "height": 512, "steps": 20}
DIALECTS: dict[str, tuple[str, dict[str, Any]]] = {
    f"/v1/{SLUG}": ("gateway/api/images.py:create", BODY),
    f"/v2/{SLUG}": ("gateway/api/images.py:submit", BODY),
    "/openai/v1/images/generations": (
        "gateway/compat/openai.py:generations",
        {"prompt": BODY["prompt"], "size": "512x512"},
    ),
    "/sdapi/v1/txt2img": ("gateway/compat/a1111.py:txt2img", BODY),
}
INSERTED = "store/jobs/queue.py:put"


class Way:
    """Calls of our functions, as "module:function", between a call of one and a return of another;
    without the coroutines that were waiting around the first, which are entered again as well.
    """

    def __init__(self, first: str, last: str) -> None:
        self._first, self._last = first, last
        self._around: set[CodeType] = set()
        self._on, self.calls = False, Counter[str]()

    @property
    def modules(self) -> set[str]:
        return {call.partition(":")[0] for call in self.calls}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if not path.startswith(f"{PACKAGE}/"):
            return
        name = f"{path[len(str(PACKAGE)) + 1 :]}:{frame.f_code.co_name}"
        if event == "return" and name == self._last:
            self._on = False
        elif event == "call" and not self.calls and name == self._first:
            outer = frame.f_back
            while outer is not None:
                self._around.add(outer.f_code)
                outer = outer.f_back
            self._on = True
        if event == "call" and self._on and frame.f_code not in self._around:
            self.calls[name] += 1

    @contextmanager
    def followed(self) -> Iterator[None]:
        """In this thread and in those that begin now."""
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)


def posted(
    folder: Path,
    path: str,
    body: dict[str, Any],
    way: Way,
    *,
    cold: bool = False,
    wait_s: float = 0.0,
) -> None:
    """Post to a gateway in this process, which has nothing else to do."""
    settings = Settings(data=folder, wait_s=wait_s)
    with store(folder / "imaged.db").write() as c:
        key = keys.create(
            c, keys.load_secret(folder), time.time(), name="t", credits_micros=10**9, rpm=10_000
        )

    async def post(gateway: Gateway) -> httpx.Response:
        app = httpx.ASGITransport(app=build_app(gateway))
        async with httpx.AsyncClient(transport=app, base_url="http://x") as client:
            if not cold:  # key and catalogue are then cached, as those of most requests are
                await client.post(f"/v2/{SLUG}/preflight", json=body, headers={"x-api-key": key})
            sys.setprofile(way)
            return await client.post(path, json=body, headers={"x-api-key": key})

    threading.setprofile(way)
    gateway = Gateway.open(settings)
    try:
        answer = asyncio.run(post(gateway))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        gateway.close()
    assert answer.status_code in (200, 504), answer.text  # 504: without a worker, after wait_s


@pytest.mark.parametrize("path", DIALECTS)
def test_from_the_route_to_the_row(tmp_path: Path, path: str) -> None:
    first, body = DIALECTS[path]
    way = Way(first, INSERTED)
    posted(tmp_path, path, body, way)
    assert INSERTED in way.calls, way.calls
    assert len(way.modules) <= MOST, sorted(way.modules)
    for once in (
        "gateway/submit/submission.py:read_submission",
        "gateway/submit/submission.py:read_json",
        "params/image_params.py:read_params",
        "prompt/a1111.py:edits",
    ):
        assert way.calls[once] == 1, once
    assert way.calls["store/jobs/idempotency.py:find"] == 0  # there is no Idempotency-Key


def readings(folder: Path) -> int:
    """How often a prompt is read that rules judge and a report tells of."""
    path = f"/v2/{SLUG}/preflight"
    way = Way("gateway/api/preflight.py:preflight", "gateway/submit/quotes.py:seal")
    posted(folder, path, BODY, way, cold=True)
    assert way.calls["moderation/rules.py:refuses"] == way.calls["prompt/report.py:report"] == 1
    return way.calls["prompt/a1111.py:edits"]


def test_a_prompt_is_read_once(tmp_path: Path) -> None:
    assert readings(tmp_path) == 1
    again = property(lambda prompt: tuple(a1111.texts(prompt.text, prompt.steps)))
    with red(Prompt, "by_step", again):
        assert readings(tmp_path) == 1


def test_the_tour_is_the_way(tmp_path: Path) -> None:
    """Each stop of docs/follow-one-image.md is a file that a request passes on its way to its
    picture; a reader changes folder eight times at most.
    """
    table = re.findall(r"^\| (\d+) \| \[`([\w/.]+)`\]", TOUR.read_text(), re.MULTILINE)
    assert [int(number) for number, _ in table] == list(range(1, len(table) + 1))
    stops = [file for _, file in table]
    assert len(stops) <= 12
    folders = [str(Path(file).parent) for file in stops]
    assert sum(a != b for a, b in pairwise(folders)) <= 8
    way = Way("gateway/api/images.py:create", "gateway/present/bodies.py:picture")
    with way.followed(), working(tmp_path):
        posted(tmp_path, f"/v1/{SLUG}", BODY, way, wait_s=60.0)
    assert [file for file in stops if file not in way.modules] == []
