"""Pictures as files: what is written into them beside the pixels."""

from __future__ import annotations

import io

from PIL import Image

from imaged.engine.decode import Picture
from imaged.params.image_params import ImageParams
from imaged.worker.encode import encode_png
from tests.unit.test_infotext import read_back


def test_a_png_carries_its_infotext_and_its_pixels() -> None:
    rgb = bytes(range(256)) * 3 * 3
    picture = Picture(rgb[: 16 * 16 * 3], 16, 16, 5)
    content = encode_png(picture, ImageParams("снег\nи лёд"), "micro")
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.tobytes()) == ("PNG", picture.rgb)
        assert read_back(str(image.info["parameters"]))["Prompt"] == "снег\nи лёд"
