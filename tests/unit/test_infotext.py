"""Infotext is read back by A1111's published grammar, whatever stands in the prompt."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from imaged.engine.decode import Picture
from imaged.infotext import infotext
from imaged.params import ImageParams
from imaged.worker.deliver import encode_png

PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def read_back(text: str) -> dict[str, str]:
    """The grammar: the last line holds pairs (at least three, else it is prompt), a line that
    begins with `Negative prompt:` begins the negative prompt, lines are stripped.
    """
    *lines, last = text.strip().split("\n")
    if len(PAIR.findall(last)) < 3:
        lines, last = [*lines, last], ""
    parts: dict[bool, list[str]] = {False: [], True: []}
    negative = False
    for line in (raw.strip() for raw in lines):
        if line.startswith("Negative prompt:"):
            negative, line = True, line[len("Negative prompt:") :].strip()
        parts[negative].append(line)
    found = {"Prompt": "\n".join(parts[False]), "Negative": "\n".join(parts[True])}
    return found | {name: value.strip('"') for name, value in PAIR.findall(last)}


HOSTILE = [
    'a "quoted" house, with: colons, (weights:1.3)',
    "two\nlines\n\nand a third",
    "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1",
    "house\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1",
    "back\\slash, \\(escaped\\)",
    "снег, 雪, ❄",
    "Size: 1x1",
]


@pytest.mark.parametrize("prompt", HOSTILE)
@pytest.mark.parametrize("negative", [None, *HOSTILE])
def test_hostile_prompts_come_back(prompt: str, negative: str | None) -> None:
    params = ImageParams(prompt, negative, scheduler="DPM Multi", guidance_scale=7.5)
    found = read_back(infotext(params, 5, 'a "model", v: 2'))
    assert found["Prompt"] == prompt
    assert found["Negative"] == (negative or "")
    assert (found["Steps"], found["CFG scale"], found["Seed"]) == ("25", "7.5", "5")
    assert (found["Sampler"], found["Size"]) == ("DPM++ 2M", "1024x1024")
    assert found["Model"] == 'a \\"model\\", v: 2'


def test_a_heading_inside_a_prompt_stays_in_the_prompt() -> None:
    for prompt in ("a\nNegative prompt: b", "Negative prompt: b", "Negative prompt: a\nb"):
        found = read_back(infotext(ImageParams(prompt, "c"), 5, "micro"))
        assert found["Negative"] == "c"
        assert found["Prompt"].lstrip(",").split() == prompt.split()


@given(st.text(min_size=1), st.text())
def test_any_prompt_keeps_its_words_and_the_pairs(prompt: str, negative: str) -> None:
    found = read_back(infotext(ImageParams(prompt, negative), 5, "micro"))
    assert found["Seed"] == "5" and found["Model"] == "micro"
    assert found["Prompt"].lstrip(",").split() == prompt.lstrip(",").split() or "\n" in prompt


def test_a_png_carries_it_and_its_pixels() -> None:
    rgb = bytes(range(256)) * 3 * 3
    picture = Picture(rgb[: 16 * 16 * 3], 16, 16, 5)
    content = encode_png(picture, ImageParams("снег\nи лёд"), "micro")
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.tobytes()) == ("PNG", picture.rgb)
        assert read_back(str(image.info["parameters"]))["Prompt"] == "снег\nи лёд"
