"""`imaged generate`, and `imaged models add` up to a picture over HTTP."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from imaged.catalogue.model import MICRO
from imaged.store.accounts.keys import load_signer
from tests.conftest import FEW_STEPS, QUICK, Server, cli, imaged

LEAST = {"img_width": 512, "img_height": 512, "num_inference_steps": 20}  # of models as added


def pixels(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB").tobytes()


def generated(folder: Path, *options: str) -> list[Path]:
    """Two samples as PNG, made in a process of their own."""
    output = ("-o", str(folder / "p.png"))
    done = imaged("generate", "x", "--samples", "2", "--seed", "6", *options, *output)
    assert done.returncode == 0, done.stderr
    files = [folder / "p-0.png", folder / "p-1.png"]
    assert done.stdout.splitlines() == [f"{files[0]}  seed 6", f"{files[1]}  seed 7"]
    calls = 2 * int(options[options.index("--steps") + 1])
    assert "checkpoint micro" in done.stderr and f"{calls}/{calls}" in done.stderr
    return files


def test_the_second_sample_is_made_again_alone(tmp_path: Path) -> None:
    """By its parameters, in this process; at the fewest steps that any model takes."""
    data = ("--data", str(tmp_path))
    shutil.copy(FEW_STEPS, tmp_path / "models.toml")
    assert cli("models", "sync", *data).exit_code == 0
    _, second = generated(tmp_path, "--width", "256", "--height", "256", "--steps", "4", *data)
    verified = cli("verify", str(second), *data)
    assert verified.exit_code == 0 and "has the pixels" in verified.stdout, verified.stderr


@pytest.mark.slow
def test_the_same_seed_is_the_same_picture(tmp_path: Path) -> None:
    small, one = ("--width", "512", "--height", "512", "--steps", "20"), tmp_path / "one.png"
    files = generated(tmp_path, *small)
    assert imaged("generate", "x", "--seed", "7", *small, "-o", str(one)).returncode == 0
    with Image.open(files[1]) as second, Image.open(one) as alone:
        assert second.size == (512, 512) and second.tobytes() == alone.tobytes()
    assert files[1].read_bytes() == one.read_bytes()
    verified = imaged("verify", str(one), cwd=tmp_path)
    assert verified.returncode == 0 and "has the pixels" in verified.stdout, verified.stderr


def test_wrong_options_are_one_line(tmp_path: Path) -> None:
    for options, words in (
        (("--steps", "5"), "--steps should be an integer between 20 and 100"),
        (("--model", "nope"), "there is no model nope"),
        (("-o", "x.gif"), "--output should end in"),
    ):
        done = cli("generate", "x", *options, cwd=tmp_path)
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
        assert done.stderr.startswith("Error: ") and words in done.stderr


def test_wrong_environment_is_one_line(tmp_path: Path) -> None:
    done = imaged("keys", "list", cwd=tmp_path, env={**os.environ, "IMAGED_PORT": "http"})
    assert done.returncode == 1 and "IMAGED_PORT should be a whole number" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_served_is_not_added(tmp_path: Path) -> None:
    for slug, folder, words in (
        ("bad", tmp_path, "has no model_index.json"),
        ("No Slug", MICRO, "a slug is"),
    ):
        options = ["--checkpoint", str(folder), "--data", str(tmp_path / "data")]
        refused = cli("models", "add", slug, *options)
        assert refused.exit_code == 1 and words in refused.output


@pytest.mark.slow
def test_an_added_checkpoint_is_served(tmp_path: Path) -> None:
    """Two slugs on different checkpoints: each job is made by its own, in one worker."""
    data, copy = tmp_path / "data", tmp_path / "copied"
    shutil.copytree(MICRO, copy)
    options = ("--checkpoint", str(copy), "--price", "0.02", "--data", str(data))
    added = cli("models", "add", "my-model", *options)
    assert added.stdout == "my-model is served from copied\n", added.stderr
    server = Server(data, environ={"IMAGED_MEMORY_GB": "0.001"}).start()  # one at a time
    try:
        with server.client() as client:
            body = {**QUICK, **LEAST, "seed": 1}
            ours, micro = (client.post(f"/v1/{s}", json=body) for s in ("my-model", "micro"))
        assert ours.headers["x-checkpoint"] == "copied"
        assert float(ours.headers["x-cost"]) == 0.02 * 0.25 * 20 / 25
        assert micro.headers["x-checkpoint"] == "micro"
        assert pixels(ours.content) == pixels(micro.content)  # their receipts differ
        shutil.rmtree(copy)
        with server.client() as client:
            client.post("/v1/micro", json=QUICK)
            gone = client.post("/v1/my-model", json=body)
        assert (gone.status_code, gone.json()["code"]) == (422, "model_unavailable")
    finally:
        server.stop()
    assert cli("models", "remove", "my-model", "--data", str(data)).exit_code == 0


@pytest.mark.slow
def test_a_picture_is_made_again_in_the_types_of_its_receipt(tmp_path: Path) -> None:
    """Also when its model is held in others by now."""
    data, toml = tmp_path / "data", tmp_path / "own.toml"
    where = ("--data", str(data))
    load_signer(data)
    for dtype in ("bf16", "fp32"):
        toml.write_text(
            f'[model.own]\ncheckpoint = "{MICRO}"\ncpu_dtype = "{dtype}"\n[model.own.parameters]\n'
            "img_width = { low = 256 }\nimg_height = { low = 256 }\n"
            "num_inference_steps = { low = 4 }\n"
        )
        imaged("models", "sync", str(toml), *where)
        path = str(tmp_path / f"{dtype}.png")
        size = ("--width", "256", "--height", "256", "--steps", "4", "--seed", "3")
        made = imaged("generate", "a red house", "--model", "own", *size, "-o", path, *where)
        assert made.returncode == 0, made.stderr
    for dtype, said in (("bf16", "bfloat16 and float32"), ("fp32", "float32")):
        again = imaged("verify", str(tmp_path / f"{dtype}.png"), *where)
        assert again.returncode == 0 and f"dtype             {said}\n" in again.stdout, again.stdout
        assert "replay            identical" in again.stdout
    first, second = ((tmp_path / f"{dtype}.png").read_bytes() for dtype in ("bf16", "fp32"))
    assert pixels(first) != pixels(second)


@pytest.mark.slow
def test_the_process_says_how_it_ended(tmp_path: Path) -> None:
    """It does not wait until torch is taken apart, and loses nothing of what it had to say."""
    size = ("--width", "512", "--height", "512", "--steps", "20", "--seed", "6")
    path = tmp_path / "x.png"
    done = imaged("generate", "x", *size, "-o", str(path))
    assert (done.returncode, done.stdout) == (0, f"{path}  seed 6\n")
    other = imaged("generate", "x", *size[:-1], "5", "-o", str(tmp_path / "y.png"))
    (tmp_path / "y.png").write_bytes(b"none")
    failed = imaged("verify", str(tmp_path / "y.png"))
    assert other.returncode == 0 and failed.returncode != 0 and failed.stderr
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "imaged", "generate", "x", *size, "-o", str(path)]
        lost = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert lost.returncode != 0 and lost.stderr  # the line with the file's name was not written
