"""The two samples of the API's own page, run as they stand: by the vendor's SDK and by ours."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import pytest
import segmind

import imaged
from imaged.catalogue import toml
from imaged.catalogue.model import DEFAULT_SLUG
from imaged.client import client as module
from imaged.params.image_params import read_params
from imaged.store.jobs import queue
from tests.contract.gate import Gate

SAMPLES = Path(__file__).parent / "published"
RUN, WAIT = ((SAMPLES / name).read_text() for name in ("run.txt", "wait.txt"))
REQUEST: dict[str, Any] = {"model": DEFAULT_SLUG, "body": toml.built_in()[DEFAULT_SLUG].sample}


@pytest.fixture(params=["vendor", "ours"])
def sdk(
    request: pytest.FixtureRequest, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """What `import segmind` gives, with the key in the environment as the page says.

    The samples name no host: the vendor's has its documented parameter `base_url`, here by
    another default, and ours reads IMAGED_URL.
    """
    monkeypatch.setenv("SEGMIND_API_KEY", gate.key)
    if request.param == "vendor":
        defaults = (None, f"{gate.url}/v1", 30.0)
        monkeypatch.setattr(segmind.SegmindClient.__init__, "__defaults__", defaults)
        monkeypatch.setattr(segmind, "_default_client", None)
        yield "vendor"
        if segmind._default_client is not None:
            segmind._default_client._client.close()
        return
    monkeypatch.setenv("IMAGED_URL", gate.url)
    monkeypatch.setattr(module, "_default", None)
    monkeypatch.setitem(sys.modules, "segmind", imaged)
    yield "ours"
    if module._default is not None:
        module._default.close()


def executed(sample: str) -> tuple[list[str], dict[str, Any]]:
    """What a sample prints, and its names."""
    out, names = io.StringIO(), dict[str, Any]()
    with redirect_stdout(out):
        exec(sample, names)
    if "client" in names:
        getattr(names["client"], "_client", names["client"]).close()
    return out.getvalue().splitlines(), names


def made_as_asked(gate: Gate, job_id: str) -> bool:
    with gate.database.read() as c:
        return queue.read(c, [job_id])[job_id].params == read_params(REQUEST["body"])[0]


def test_the_pages_first_sample(sdk: str, gate: Gate) -> None:
    (status, output, seconds), names = executed(RUN)
    assert (status, seconds) == ("COMPLETED", "0.25")
    assert httpx.get(output).headers["content-type"] == "image/jpeg"
    assert made_as_asked(gate, names["result"]["request_id"])


def test_the_pages_second_sample(sdk: str, gate: Gate) -> None:
    [job_id], names = executed(WAIT)
    assert names["result"]["status"] == "COMPLETED" and names["result"]["request_id"] == job_id
    assert made_as_asked(gate, job_id)


def test_the_pages_second_sample_when_the_job_fails(sdk: str) -> None:
    """Nothing but the prompt is another one."""
    failing = WAIT.replace(REQUEST["body"]["prompt"], "fail: content policy")
    assert executed(failing)[0][1:] == ["failed: content policy"]
