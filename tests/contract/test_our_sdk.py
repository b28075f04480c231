"""Our SDK: the vendor's verbs and names, pictures, and sending again without asking twice."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_retries import RetryTransport

import imaged
from imaged.client import calls
from imaged.client import client as module
from imaged.client.result import Result
from tests.contract.gate import Gate


@pytest.fixture
def environment(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What stands in a user's shell."""
    monkeypatch.setenv("IMAGED_URL", gate.url)
    monkeypatch.setenv("SEGMIND_API_KEY", gate.key)
    monkeypatch.setattr(module, "_default", None)
    yield
    if module._default is not None:
        module._default.close()


def test_the_modules_groups_and_names(environment: None, gate: Gate) -> None:
    assert imaged.SegmindClient is imaged.Client and imaged.SegmindError is imaged.ImagedError
    assert imaged.models.list() and imaged.accounts.current()["credits"] > 0
    request_id = imaged.run(gate.slug, prompt="x")["request_id"]
    assert imaged.generations.get(request_id)["model_status"] == "COMPLETED"


BAD_ADDRESSES = [
    *("127.0.0.1:8000", "localhost", "//x", "ftp://x", "http://", "https:///v1", "http://["),
    *("http:", "http://x:0", "http://x:99999", "http://x:port", "http://me:secret@x:port"),
    *("http://x\r\ny", "http://a b\0", "http://x?a=b", "http://x#a", "http://\ud800/"),
    "http://" + "x" * 70_000,
]


@pytest.mark.parametrize("made", [imaged.Client, imaged.AsyncClient])
@pytest.mark.parametrize("address", BAD_ADDRESSES, ids=lambda text: repr(text[:20]))
def test_a_wrong_address_is_named_before_anything_is_sent(
    made: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(imaged.BadAddress, match=r"^base_url should be http:// or https://") as one:
        made("SG_x", address)
    if "\0" not in address and "\ud800" not in address:  # no shell can set these
        monkeypatch.setenv("IMAGED_URL", address)
        with pytest.raises(imaged.ImagedError, match=r"^IMAGED_URL should be http:// or https://"):
            made("SG_x")
    assert "secret" not in str(one.value) and one.value.status is None


def test_an_address_may_have_a_path_and_end_as_the_vendors_does(gate: Gate) -> None:
    for address in (gate.url, f"{gate.url}/", f" {gate.url}/v1/ ", f"{gate.url}/v2"):
        with imaged.Client(gate.key, address) as client:
            assert client.origin == gate.url and client.models.list()
    with imaged.Client(gate.key, "https://x.example/under/v1") as client:
        assert client.origin == "https://x.example/under"


def test_a_model_that_is_no_part_of_a_url_is_our_error(gate: Gate) -> None:
    async def main() -> None:
        async with imaged.AsyncClient(gate.key, gate.url) as client:
            await client.submit_async("a\nb", prompt="x")

    with imaged.Client(gate.key, gate.url) as client, pytest.raises(imaged.BadAddress):
        client.submit_async("a\nb", prompt="x")
    with pytest.raises(imaged.BadAddress):
        asyncio.run(main())


def test_pictures_and_files(gate: Gate, tmp_path: Path) -> None:
    small: dict[str, Any] = {"img_width": 512, "img_height": 512}
    with imaged.Client(gate.key, gate.url) as client:
        one = client.run(gate.slug, prompt="x", **small)
        two = client.run(gate.slug, prompt="x", samples=2, base64=True, **small)
    assert isinstance(one, dict) and [image.size for image in one.images()] == [(512, 512)]
    assert one.save(tmp_path / "house.jpg") == [tmp_path / "house.jpg"]
    assert two.save(tmp_path / "two.jpg") == [tmp_path / "two-0.jpg", tmp_path / "two-1.jpg"]
    [kept] = one.save(tmp_path)
    assert kept.name == one["images"][0]["file_name"]
    assert kept.read_bytes() == (tmp_path / "house.jpg").read_bytes() != b""
    gone = type(one)({"images": [{**one["images"][0], "url": one["output"] + "0"}]})
    with pytest.raises(imaged.ImagedError, match="no such file"):
        gone.images()


def test_pictures_without_blocking(gate: Gate, tmp_path: Path) -> None:
    async def main() -> Any:
        async with imaged.AsyncClient(gate.key, gate.url) as client:
            result = await (await client.submit_async(gate.slug, prompt="x")).wait(interval=0.02)
            answer = await client.run_sync(gate.slug, prompt="x")
            [content] = await result.contents()
            return await result.images(), await result.save(tmp_path / "a.jpg"), answer, content

    images, [path], answer, content = asyncio.run(main())
    assert content == path.read_bytes()
    assert images[0].size == (1024, 1024) and path.stat().st_size > 0
    assert answer.headers["content-type"] == "image/jpeg"


def test_the_vendors_other_verbs(gate: Gate) -> None:
    with imaged.Client(gate.make_key(), gate.url) as client:
        result = client.run(gate.slug, prompt="x")
        [row] = client.generations.list()["data"]
        assert row["request_id"] == result["request_id"]
        assert client.generations.recent(gate.slug)["data"] == [row]
        assert client.generations.get(row["request_id"])["model_status"] == "COMPLETED"
        assert client.generations.history(status="FAILED")["data"] == []
        assert client.accounts.current()["credits"] > 0
        assert client.models.list()
        with pytest.raises(imaged.ImagedError, match="not found"):
            client.generations.get("0" * 32)


def test_webhooks_and_the_modules_group(environment: None, gate: Gate) -> None:
    key = gate.make_key()
    with imaged.Client(key, gate.url) as client:
        hooks = client.webhooks
        added = hooks.add("https://example.com/hook", ["GENERATION"])
        assert added.pop("secret").startswith("whsec_")
        assert hooks.get() == {"webhooks": [added]} != imaged.webhooks.get()
        changed = hooks.update(added["webhook_id"], "https://example.com/2", ["generation.failed"])
        assert changed["webhook_url"] == "https://example.com/2"
        assert hooks.get() == {"webhooks": [changed]}
        assert hooks.logs(added["webhook_id"])["logs"] == []
        assert hooks.delete(added["webhook_id"])["is_active"] is False
        assert hooks.get() == {"webhooks": []}
        with pytest.raises(imaged.ImagedError, match="types should be"):
            hooks.add("https://example.com/hook", [])


def test_the_same_groups_without_blocking(gate: Gate) -> None:
    async def main() -> None:
        async with imaged.AsyncClient(gate.make_key(), gate.url) as client:
            request_id = (await client.run(gate.slug, prompt="x"))["request_id"]
            [row] = (await client.generations.list())["data"]
            assert row["request_id"] == request_id and await client.models.list()
            assert (await client.accounts.current())["credits"] > 0
            added = await client.webhooks.add("https://example.com/hook", ["GENERATION"])
            assert len((await client.webhooks.get())["webhooks"]) == 1
            assert not (await client.webhooks.delete(added["webhook_id"]))["is_active"]
            with pytest.raises(imaged.ImagedError, match="webhook"):
                await client.webhooks.logs("none")

    asyncio.run(main())


def test_no_method_of_an_asynchronous_result_blocks() -> None:
    """Whatever fetches is awaited: what `Result` has and AsyncResult inherits does no I/O."""
    from imaged.client.result import AsyncResult

    given = {name for name, value in vars(Result).items() if inspect.isfunction(value)}
    inherited = {name for name in given if getattr(Result, name) is getattr(AsyncResult, name)}
    assert inherited == {"paths"}
    assert all(inspect.iscoroutinefunction(getattr(AsyncResult, n)) for n in given - inherited)


def test_run_with_a_bar(environment: None, gate: Gate, capfd: pytest.CaptureFixture[str]) -> None:
    """`progress` is for the bar; the server is not asked about it."""
    asked: list[bytes] = []
    imaged.models.list()  # makes the default client
    assert module._default is not None
    module._default.http.event_hooks = {"request": [lambda request: asked.append(request.read())]}
    assert imaged.run(gate.slug, prompt="x", progress=True)["status"] == "COMPLETED"

    async def main() -> None:
        async with imaged.AsyncClient(gate.key, gate.url) as client:
            await client.run(gate.slug, prompt="x", progress=True)

    asyncio.run(main())
    bars = capfd.readouterr().err.strip().split("\n")
    assert len(bars) == 2 and all("completed: 100%" in bar for bar in bars)
    assert asked[0] == b'{"prompt":"x"}'


# -- no answer --------------------------------------------------------------------------------


def test_a_server_that_cannot_be_reached_is_an_error_of_ours(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is asked, and by whichever client; the links of a result too."""
    lossy = Lossy(999, lost)
    answer = {"request_id": "a", "status_url": gate.url, "response_url": gate.url}
    with over(gate, lossy, monkeypatch) as client:
        job = imaged.Job(client, answer)
        asked: list[Callable[[], Any]] = [
            *(client.models.list, client.accounts.current, job.status, job.result, job.cancel),
            *(partial(call, gate.slug, prompt="x") for call in (client.run, client.run_sync)),
            Result({"images": [{"url": f"{gate.url}/files/x"}]}).contents,
        ]
        for ask in asked:
            with pytest.raises(imaged.NoAnswer, match="the connection broke") as caught:
                ask()
            assert isinstance(caught.value.__cause__, httpx.ReadError)
    assert issubclass(imaged.NoAnswer, imaged.SegmindError) and caught.value.status is None


def test_who_did_not_answer_is_said_without_the_password() -> None:
    lost = pytest.raises(imaged.NoAnswer)
    with imaged.Client("SG_x", "http://anna:secret@127.0.0.1:1") as client, lost as caught:
        client.models.list()
    assert "no answer from http://127.0.0.1:1: " in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_same_without_blocking() -> None:
    async def main() -> None:
        async with imaged.AsyncClient("SG_x", "http://nowhere") as client:
            client.http.base_url = httpx.URL("gopher://nowhere")  # as lost as can be, and at once
            for ask in (client.run, client.run_sync, client.submit_async):
                with pytest.raises(imaged.NoAnswer):
                    await ask("slug", prompt="x")
            with pytest.raises(imaged.NoAnswer):
                await client.models.list()

    asyncio.run(main())


# -- sending again ----------------------------------------------------------------------------


class Lossy(httpx.BaseTransport):
    """Delivers every request and loses the first answers, or never delivers at all."""

    def __init__(self, losses: int, lose: Callable[[httpx.Response], httpx.Response]) -> None:
        self.losses, self.lose = losses, lose
        self.sent: list[httpx.Request] = []
        self._real = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(request)
        answer = self._real.handle_request(request)
        if len(self.sent) > self.losses:
            return answer
        answer.close()
        return self.lose(answer)

    def close(self) -> None:
        self._real.close()


def lost(_: httpx.Response) -> httpx.Response:
    raise httpx.ReadError("the connection broke")


def busy(_: httpx.Response) -> httpx.Response:
    return httpx.Response(503, json={"error": "busy"})


def over(gate: Gate, lossy: Lossy, monkeypatch: pytest.MonkeyPatch) -> imaged.Client:
    monkeypatch.setattr(
        calls, "transport", lambda: RetryTransport(transport=lossy, retry=calls.READS)
    )
    monkeypatch.setattr("time.sleep", lambda _: None)
    return imaged.Client(gate.key, gate.url)


@pytest.mark.parametrize("lose", [lost, busy])
def test_reads_are_sent_again(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, lose: Callable[[Any], Any]
) -> None:
    lossy = Lossy(3, lose)
    with over(gate, lossy, monkeypatch) as client:
        assert client.models.list()
    assert [request.method for request in lossy.sent] == ["GET"] * 4


@pytest.mark.parametrize("lose", [lost, busy])
def test_a_submit_is_sent_again_under_the_same_key(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, lose: Callable[[Any], Any]
) -> None:
    lossy = Lossy(2, lose)
    with over(gate, lossy, monkeypatch) as client:
        client.submit_async(gate.slug, prompt="x")
        client.submit_async(gate.slug, prompt="x")
    used = [request.headers["idempotency-key"] for request in lossy.sent]
    assert len(used) == 4 and used[0] == used[1] == used[2] != used[3]
    assert {request.content for request in lossy.sent} == {lossy.sent[0].content}


def test_a_post_without_a_key_is_never_sent_again(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: a submit that lost its header, and with it the leave to be repeated."""
    lossy = Lossy(2, lost)
    with over(gate, lossy, monkeypatch) as client, pytest.raises(httpx.ReadError):
        client.http.post(f"/v2/{gate.slug}", json={"prompt": "x"})
    assert len(lossy.sent) == 1


def test_refusals_are_not_sent_again(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    lossy = Lossy(0, lost)
    with over(gate, lossy, monkeypatch) as client, pytest.raises(imaged.ImagedError):
        client.submit_async(gate.slug, prompt="x", samples=9)
    assert len(lossy.sent) == 1
