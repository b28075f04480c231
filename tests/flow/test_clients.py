"""The vendor's SDK, unchanged apart from its base URL, and our own, against a real server."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
import segmind
from PIL import Image
from segmind import InferenceFailed, InferenceTimeout, SegmindClient, SegmindError

import imaged
from tests.conftest import QUICK, SLUG, Server


@pytest.fixture
def client(server: Server) -> Iterator[SegmindClient]:
    vendors = SegmindClient(api_key=server.key, base_url=f"{server.url}/v1", timeout=120)
    yield vendors
    vendors._client.close()  # it has no close of its own


# -- the vendor's SDK -------------------------------------------------------------------------


def test_run(client: SegmindClient) -> None:
    result = client.run(SLUG, **QUICK)
    assert result["status"] == "COMPLETED"
    assert result["metrics"]["inference_time"] > 0
    content = httpx.get(result.get("output")).content
    assert Image.open(io.BytesIO(content)).size == (256, 256)


def test_run_sync(client: SegmindClient) -> None:
    response = client.run_sync(SLUG, **QUICK)
    assert Image.open(io.BytesIO(response.content)).format == "JPEG"
    assert float(response.headers["x-remaining-credits"]) > 0


def test_submit_and_wait(client: SegmindClient) -> None:
    job = client.submit_async(SLUG, **QUICK)
    assert job.request_id
    result = job.wait(timeout=120, interval=0.1)
    assert result["output"].startswith("http")


def test_timeout(client: SegmindClient) -> None:
    job = client.submit_async(SLUG, **{**QUICK, "num_inference_steps": 100, "samples": 4})
    with pytest.raises(InferenceTimeout) as caught:
        job.wait(timeout=0.1, interval=0.05)
    assert caught.value.request_id == job.request_id
    httpx.delete(job.response_url, headers={"x-api-key": client.api_key})
    with pytest.raises(InferenceFailed) as failed:
        job.wait(timeout=60, interval=0.05)
    assert "cancelled" in failed.value.detail
    assert failed.value.status_body["status"] == "FAILED"


@pytest.mark.parametrize(
    ("slug", "params", "status", "words"),
    [
        (SLUG, {"prompt": "x", "samples": 9}, 400, "samples should be"),
        (SLUG, {}, 400, "prompt is mandatory"),
        ("no-such-model", {"prompt": "x"}, 404, "no model"),
    ],
)
def test_refusals(
    client: SegmindClient, slug: str, params: dict[str, Any], status: int, words: str
) -> None:
    for call in (client.run, client.run_sync, client.submit_async):
        with pytest.raises(SegmindError) as caught:
            call(slug, **params)
        assert caught.value.status == status
        assert words in caught.value.detail


def test_unknown_request_and_wrong_key(server: Server, client: SegmindClient) -> None:
    job = client.submit_async(SLUG, **QUICK)
    job.status_url = job.status_url.replace(job.request_id, "0" * 32)
    with pytest.raises(SegmindError) as caught:
        job.wait(timeout=60, interval=0.1)
    assert caught.value.status == 404
    stranger = SegmindClient(api_key="SG_wrong", base_url=f"{server.url}/v1")
    with pytest.raises(SegmindError) as caught:
        stranger.run(SLUG, **QUICK)
    stranger._client.close()
    assert caught.value.status == 401
    httpx.delete(job.response_url, headers={"x-api-key": server.key})


def test_module_functions_with_another_default_client(
    client: SegmindClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmind, "_default_client", client)
    assert segmind.run(SLUG, **QUICK)["status"] == "COMPLETED"


# -- ours -------------------------------------------------------------------------------------


def test_our_client(server: Server) -> None:
    with imaged.Client(server.key, server.url) as ours:
        job = ours.submit_async(SLUG, **QUICK)
        result = job.wait(timeout=120, interval=0.05)
        assert result["status"] == "COMPLETED" and result["checkpoint"] == "micro"
        assert ours.run_sync(SLUG, **QUICK).headers["content-type"] == "image/jpeg"
        cancelled = ours.submit_async(SLUG, **{**QUICK, "num_inference_steps": 100})
        assert cancelled.cancel()["code"] == "cancelled"
        with pytest.raises(imaged.InferenceFailed, match="cancelled"):
            cancelled.wait()
        with pytest.raises(imaged.ImagedError, match="seed should be") as caught:
            ours.run(SLUG, **{**QUICK, "seed": -5})
        assert (caught.value.status, caught.value.code) == (400, "bad_parameter")


def test_our_async_client(server: Server) -> None:
    async def main() -> Sequence[dict[str, Any]]:
        async with imaged.AsyncClient(server.key, f"{server.url}/v1") as ours:
            jobs = [await ours.submit_async(SLUG, **QUICK, seed=n) for n in range(3)]
            results = await asyncio.gather(*(job.wait(interval=0.05) for job in jobs))
            slow = await ours.submit_async(SLUG, **{**QUICK, "num_inference_steps": 100})
            with pytest.raises(imaged.InferenceTimeout):
                await slow.wait(timeout=0.01, interval=0.05)
            await slow.cancel()
            return results

    results = asyncio.run(main())
    assert [result["seed"] for result in results] == ["0", "1", "2"]


def test_our_module_functions_read_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imaged.client import client as module

    monkeypatch.setattr(module, "_default", None)
    monkeypatch.setenv("IMAGED_URL", server.url)
    monkeypatch.setenv("SEGMIND_API_KEY", server.key)
    assert imaged.run(SLUG, **QUICK)["status"] == "COMPLETED"
    assert imaged.run_sync(SLUG, **QUICK).content
    imaged.submit_async(SLUG, **QUICK).cancel()
    assert module._default is not None
    module._default.close()
