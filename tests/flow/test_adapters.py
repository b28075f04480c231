"""LoRA, textual inversion and models.toml on a real server with a real worker."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import save_file

from imaged.catalogue.model import MICRO
from tests.conftest import QUICK, Server, imaged, until
from tests.golden.test_embeddings import vectors
from tests.golden.test_lora import attention, halves, kohya

SLUG = "sdxl-lightning"  # which takes few steps
LITTLE = {**QUICK, "num_inference_steps": 4, "img_width": 256, "img_height": 256}


@pytest.fixture(scope="module")
def furnished(server: Server, nets: Any) -> Server:
    """The server with a LoRA of its checkpoint, one of another, and a textual inversion."""
    loras, embeddings = server.data / "loras", server.data / "embeddings"
    loras.mkdir()
    embeddings.mkdir()
    drawn = halves(attention(nets), 1)
    save_file(kohya(drawn), loras / "ink.safetensors")
    (loras / "bad.safetensors").write_bytes(b"\x80\x04 a pickle")
    widths = (nets.text_encoder.config.hidden_size, nets.text_encoder_2.config.hidden_size)
    save_file(vectors(2, widths), embeddings / "mystyle.safetensors")
    return server


def test_pictures_with_and_without(furnished: Server) -> None:
    with furnished.client() as client:

        def picture(prompt: str, **params: Any) -> bytes:
            body = {**LITTLE, "seed": 1, "prompt": prompt, **params}
            answer = client.post(f"/v1/{SLUG}", json=body)
            assert answer.status_code == 200, answer.text
            with Image.open(io.BytesIO(answer.content)) as image:
                return image.tobytes()

        plain = picture("a house")
        inked = picture("a house", loras=[{"name": "ink", "weight": 0.7}])
        assert picture("a house <lora:ink:0.7>") == inked != plain
        styled = picture("a house mystyle")
        (furnished.data / "embeddings" / "mystyle.safetensors").unlink()
        assert picture("a house mystyle") != styled  # the same words, and words are all they are
        assert picture("a house") == plain
        before = client.get("/v1/credits").json()["data"]["credits"]["remaining"]
        refused = client.post(f"/v1/{SLUG}", json={**LITTLE, "loras": ["none"]})
        assert (refused.status_code, refused.json()["code"]) == (400, "bad_parameter")
        failed = client.post(f"/v1/{SLUG}", json={**LITTLE, "loras": ["bad"]})
        assert (failed.status_code, failed.json()["code"]) == (422, "bad_lora")
        assert "is a pickle" in failed.json()["error"]
        assert client.get("/v1/credits").json()["data"]["credits"]["remaining"] == before


@pytest.mark.slow
def test_a_server_takes_its_models_from_the_file(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "models.toml").write_text(
        f'[model.house]\ncheckpoint = "{MICRO}"\ntitle = "Houses"\nprice = 0.5\n'
        "[model.house.parameters]\nimg_width = { low = 256, high = 768, default = 512 }\n"
        "img_height = { low = 256 }\nnum_inference_steps = { low = 4 }\n"
    )
    server = Server(data).start()
    try:
        with server.client() as client:
            models = {m["slug"]: m for m in client.get("/v1/models").json()["models"]}
            assert (models["house"]["title"], models["house"]["price_1024px_25_steps"]) == (
                "Houses",
                0.5,
            )
            wide = client.post("/v1/house", json={**QUICK, "img_width": 1024})
            assert "between 256 and 768" in wide.json()["error"]
            made = client.post("/v1/house", json=QUICK)
            assert made.status_code == 200 and made.headers["x-checkpoint"] == "micro"
            until(lambda: server.states()["house"] in ("READY", "BUSY"))  # told once a second
            assert 'imaged_model_state{model="house"' in client.get("/metrics").text
    finally:
        server.stop()


@pytest.mark.slow
def test_a_wrong_file_of_models_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('[model.x]\ncheckpoint = "/nowhere/x.safetensors"\n')
    done = imaged("serve", "--data", str(tmp_path), "--port", "1")
    assert done.returncode == 1
    assert "there is no file or folder /nowhere/x.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
