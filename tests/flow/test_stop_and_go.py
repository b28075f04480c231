"""Draft, look, finish; receipts and replays: over HTTP, with our clients, on the command line."""

from __future__ import annotations

import asyncio
import io
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import imaged as sdk
from imaged.client.result import Result
from imaged.provenance import receipts
from imaged.store.accounts import keys
from tests.conftest import QUICK, SLUG, Server, cli

JOB = {**QUICK, "num_inference_steps": 12, "seed": 20, "samples": 3}
SMALL = ("--width", "256", "--height", "256", "--steps", "8")


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    with sdk.Client(server.key, server.url) as client:
        yield client


@pytest.fixture(scope="module")
def whole(client: sdk.Client) -> Result:
    """The pictures of a job that never stopped."""
    return client.run(SLUG, **JOB)


def test_what_is_finished_was_never_stopped(client: sdk.Client, whole: Result) -> None:
    job = client.submit_async(SLUG, **JOB, draft={"steps": 4})
    draft = job.draft(interval=0.05)
    assert (draft["step"], draft["steps"]) == (4, 12)
    looks = draft.contents()
    assert len(set(looks)) == 3 and not set(looks) & set(whole.contents())
    with pytest.raises(sdk.ImagedError, match="rests as a draft"):
        job.wait()
    job.finish([0, 2])
    done = job.wait(interval=0.05)
    first, _, third = whole.contents()
    assert done.contents() == [first, third]
    assert [image["seed"] for image in done["images"]] == [20, 22]
    ratio = done["metrics"]["cost"] / whole["metrics"]["cost"]
    assert ratio == pytest.approx((3 * 4 + 2 * 8) / 36, abs=0.01)
    with pytest.raises(sdk.ImagedError, match="rests"):
        job.finish([1])


def test_our_async_client(server: Server, whole: Result) -> None:
    async def main() -> list[bytes]:
        async with sdk.AsyncClient(server.key, server.url) as ours:
            job = await ours.submit_async(SLUG, **JOB, draft={"fraction": 0.3})
            await job.draft(interval=0.05)
            await job.finish([1])
            return await (await job.wait(interval=0.05)).contents()

    assert asyncio.run(main()) == whole.contents()[1:2]


def test_another_end_is_another_picture_and_says_so(client: sdk.Client, whole: Result) -> None:
    """From the same beginning: what changes is what comes after."""
    made = {}
    for name, change in (("prompt", "a red boat at night"), ("guidance_scale", 2.0)):
        job = client.submit_async(SLUG, **JOB, draft={"steps": 4})
        job.draft(interval=0.05)
        job.finish([0], **{name: change})
        made[name] = job.wait(interval=0.05)
        [receipt] = [image["receipt"] for image in made[name]["images"]]
        assert receipt["varied"] is True and receipt["determinism"] == "close"
        with pytest.raises(sdk.ImagedError, match="changed on its way"):
            client._ask("POST", "/v2/replay", json={"receipt": receipt})
    pictures = [*(result.contents()[0] for result in made.values()), whole.contents()[0]]
    assert len(set(pictures)) == 3
    assert made["prompt"]["prompt"] == "a red boat at night"
    near, far = (apart(made["guidance_scale"].images()[0], one) for one in whole.images()[:2])
    assert near < far / 2


def apart(one: Image.Image, other: Image.Image) -> float:
    """The mean difference in levels."""
    pairs = zip(one.tobytes(), other.tobytes(), strict=True)
    return sum(abs(a - b) for a, b in pairs) / (3 * one.width * one.height)


def replay(server: Server, receipt: Any) -> httpx.Response:
    with server.client() as http:
        return http.post("/v2/replay", json={"receipt": receipt})


def signed(server: Server, before: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A receipt that says something else, signed by the installation itself."""
    facts = {n: v for n, v in {**before, **changes}.items() if n in receipts.FACTS}
    return receipts.sign(facts, keys.load_signer(server.data))


def test_a_receipt_makes_its_picture_again(server: Server, whole: Result) -> None:
    receipt = whole["images"][1]["receipt"]
    assert receipt["request"]["seed"] == 21 and "samples" not in receipt["request"]
    answer = replay(server, receipt).json()
    assert answer["verdict"] == "identical" and answer["signed_here"] is True
    assert answer["differences"] == [] and answer["receipt"] == receipt
    assert answer["metrics"]["cost"] == pytest.approx(whole["metrics"]["cost"] / 3, abs=1e-6)
    assert httpx.get(answer["output"]).content == whole.contents()[1]


def test_what_is_no_receipt_is_refused(server: Server, whole: Result) -> None:
    receipt = whole["images"][0]["receipt"]
    stranger = Ed25519PrivateKey.generate()
    for wrong, words in (
        (None, "it is no receipt"),
        ({}, "it is no receipt"),
        ({**receipt, "more": 1}, "it is no receipt"),
        ({**receipt, "model": "micro"}, "signature is not of what it says"),
        ({**receipt, "key": receipts.public(stranger)}, "signature is not of what it says"),
        ({**receipt, "signature": "é"}, "signature is not of what it says"),
        ({**receipt, "key": [1]}, "signature is not of what it says"),
        ({**receipt, "receipt": 2}, "another version"),
        (signed(server, receipt, request={"prompt": "x", "colour": "red"}), "not known here"),
    ):
        answer = replay(server, wrong)
        assert answer.status_code == 400, wrong
        assert answer.json()["error"].startswith("receipt") and words in answer.json()["error"]
    wide = signed(server, receipt, request={**receipt["request"], "img_width": 9000})
    assert "img_width should be" in replay(server, wide).json()["error"]
    elsewhere = receipts.sign({n: receipt[n] for n in receipts.FACTS}, stranger)
    assert replay(server, elsewhere).json()["signed_here"] is False


def test_a_receipt_survives_javascript(server: Server, whole: Result) -> None:
    """Which knows no whole number with a point."""
    text = json.dumps(whole["images"][0]["receipt"])
    shorter = re.sub(r'(": \d+)\.0(?=[,}])', r"\1", text)
    assert '"guidance_scale": 7.0' in text and '"guidance_scale": 7,' in shorter
    again = json.loads(shorter)
    assert receipts.read(again)["signature"] == whole["images"][0]["receipt"]["signature"]


def test_pictures_of_wider_aliases_are_made_again(server: Server) -> None:
    few = {**QUICK, "num_inference_steps": 4, "seed": 1, "base64": False}
    with server.client() as http:
        job_id = http.post("/v2/sdxl-lightning", json=few).json()["request_id"]
        http.get(f"/v2/requests/{job_id}/status?wait=30")
        [image] = http.get(f"/v2/requests/{job_id}").json()["images"]
    assert replay(server, image["receipt"]).json()["verdict"] == "identical"


def test_a_draft_is_not_waited_for_with_a_bar(client: sdk.Client) -> None:
    with pytest.raises(sdk.ImagedError, match="rests as a draft"):
        client.run(SLUG, progress=True, **JOB, draft={"steps": 2})


def test_the_key_is_there_for_all_to_see(server: Server, whole: Result) -> None:
    key = httpx.get(f"{server.url}/v1/receipt-key").json()["key"]
    assert key == whole["images"][0]["receipt"]["key"]
    assert (server.data / "receipt-key").stat().st_mode & 0o77 == 0


# -- the command line -------------------------------------------------------------------------


def verify(*args: str, cwd: Path) -> Any:
    return cli("verify", *args, cwd=cwd)


def test_a_file_that_was_changed_is_found_out(
    server: Server, client: sdk.Client, tmp_path: Path
) -> None:
    job = {**QUICK, "seed": 3, "prompt": "a café, 🏔️"}
    [path] = client.run(SLUG, **job).save(tmp_path / "p.jpg")
    altered = retouched(path, tmp_path / "altered.jpg")  # untouched ones: test_docs.py
    bad = verify(str(altered), "--data", str(server.data), cwd=tmp_path)
    assert bad.exit_code == 1 and "differs from the picture made again" in bad.stdout
    assert "signed by this key" in bad.stdout and "identical" in bad.stdout
    assert "a café" in bad.stdout


def retouched(path: Path, target: Path) -> Path:
    """The same file with a white corner and what is written in it."""
    with Image.open(path) as image:
        image.load()
        comment = image.info["comment"]
        image.paste((255, 255, 255), (0, 0, 16, 16))
        image.save(target, "JPEG", quality=95, subsampling=0, comment=comment)
    return target


def test_other_files_are_told_apart(server: Server, whole: Result, tmp_path: Path) -> None:
    [path] = Result(images=whole["images"][:1]).save(tmp_path / "p.jpg")
    unknown = verify(str(path), "--no-replay", "--data", str(tmp_path / "no"), cwd=tmp_path)
    assert unknown.exit_code == 0 and "a key that is not known here" in unknown.stdout
    stranger = verify(str(path), "--no-replay", "--key", "AAAA", cwd=tmp_path)
    assert stranger.exit_code == 1 and "another key" in stranger.stdout
    bare = tmp_path / "bare.png"
    Image.new("RGB", (8, 8)).save(bare)
    assert "neither a receipt nor parameters" in verify(str(bare), cwd=tmp_path).stderr
    (tmp_path / "x.png").write_bytes(b"no picture")
    assert "is not a picture" in verify("x.png", cwd=tmp_path).stderr
    forged = tmp_path / "forged.jpg"
    receipt = {**whole["images"][0]["receipt"], "model": "micro"}
    deep = '{"receipt":' + "[" * 50_000
    text = PngInfo()
    text.add_text("receipt", deep)
    Image.new("RGB", (8, 8)).save(bare, pnginfo=text)
    assert "its receipt is not whole" in verify(str(bare), cwd=tmp_path).stderr
    lines = signed(server, whole["images"][0]["receipt"], device="x\nreplay            identical")
    text = PngInfo()
    text.add_text("receipt", json.dumps(lines, separators=(",", ":")))
    Image.new("RGB", (8, 8)).save(bare, pnginfo=text)
    assert "\nreplay" not in verify(str(bare), "--no-replay", cwd=tmp_path).stdout
    Image.new("RGB", (8, 8)).save(forged, comment=json.dumps(receipt, separators=(",", ":")))
    assert "signature is not of what it says" in verify(str(forged), cwd=tmp_path).stderr


def test_drafts_on_the_command_line(server: Server, tmp_path: Path) -> None:
    data = ("--data", str(server.data))
    given = ("generate", "a red house", "--samples", "4", "--seed", "5", *SMALL, *data)
    asked = cli(*given, "--draft", "3", "-o", "p.png", cwd=tmp_path, input="7\n1,3\n")
    assert asked.exit_code == 0, asked.stderr
    lines = ["p-draft.jpg  4 drafts after step 3 of 8", "p-1.png  seed 6", "p-3.png  seed 8"]
    assert asked.stdout.splitlines() == lines
    assert "Finish which?" in asked.stderr and "numbers from 0 to 3" in asked.stderr
    with Image.open(tmp_path / "p-draft.jpg") as sheet:
        assert sheet.size == (768, 2 * (384 + 32))
    whole = cli(*given, "-o", "w.png", cwd=tmp_path)
    assert whole.exit_code == 0, whole.stderr
    for k in (1, 3):
        assert (tmp_path / f"p-{k}.png").read_bytes() == (tmp_path / f"w-{k}.png").read_bytes()
    signed = verify("p-1.png", *data, "--no-replay", cwd=tmp_path)
    assert signed.exit_code == 0 and "signed by this key" in signed.stdout, signed.stderr
    refused = cli(*given, "--draft", "8", cwd=tmp_path)
    assert refused.exit_code == 1 and "between 1 and 7" in refused.stderr


def test_a_jpeg_with_a_receipt_is_a_jpeg(whole: Result) -> None:
    content = whole.contents()[0]
    assert content[:4] == b"\xff\xd8\xff\xe0"  # what names it comes first
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert json.loads(image.info["comment"]) == whole["images"][0]["receipt"]
