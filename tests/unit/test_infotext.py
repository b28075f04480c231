"""Infotext is read back by the grammar of A1111's readers, whatever stands in the prompt."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imaged.params.image_params import ImageParams
from imaged.provenance.infotext import infotext

NAME = re.compile(r"\w[\w /-]*")


def pairs(line: str) -> dict[str, str]:
    """`Name: value, Name: "quoted, value"` -> values by name; empty if the line is not that."""
    found: dict[str, str] = {}
    rest = line
    while rest:
        name, colon, rest = rest.partition(":")
        if not colon or not NAME.fullmatch(name.strip()):
            return {}
        rest = rest.strip()
        if rest.startswith('"'):
            value, end = json.JSONDecoder().raw_decode(rest)
            rest = rest[end:].removeprefix(",")
        else:
            value, _, rest = rest.partition(",")
        found[name.strip()] = value
    return found


def read_back(text: str) -> dict[str, str]:
    """What readers of this text do: lines are stripped; the last holds pairs, at least three, or
    is prompt; one that begins with `Negative prompt:` begins the negative prompt.
    """
    lines = [line.strip() for line in text.strip().split("\n")]
    last = pairs(lines[-1])
    if len(last) >= 3:
        lines.pop()
    at = next((n for n, line in enumerate(lines) if line.startswith("Negative prompt:")), None)
    prompt, negative = (lines, []) if at is None else (lines[:at], lines[at:])
    if negative:
        negative[0] = negative[0].removeprefix("Negative prompt:").strip()
    return {"Prompt": "\n".join(prompt), "Negative": "\n".join(negative), **last}


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
    assert found["Model"] == 'a "model", v: 2'


def test_a_heading_inside_a_prompt_stays_in_the_prompt() -> None:
    for prompt in ("a\nNegative prompt: b", "Negative prompt: b", "Negative prompt: a\nb"):
        found = read_back(infotext(ImageParams(prompt, "c"), 5, "micro"))
        assert found["Negative"] == "c"
        assert found["Prompt"].lstrip(",").split() == prompt.split()


@given(st.text(min_size=1), st.text())
def test_any_prompt_keeps_its_words_and_the_pairs(prompt: str, negative: str) -> None:
    found = read_back(infotext(ImageParams(prompt, negative), 5, "micro"))
    assert found["Seed"] == "5" and found["Model"] == "micro"
    assert found["Prompt"].lstrip(",").split() == prompt.lstrip(",").split()


# -- as A1111 itself reads it -----------------------------------------------------------------

THEIR_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def read_by_theirs(text: str) -> dict[str, str]:
    """The web UI's rule: pairs are looked for anywhere in the last line, and three make it one of
    parameters; a quoted value is JSON. Every line after a heading is negative, further headings
    are taken off.
    """
    *lines, last = text.strip().split("\n")
    found = THEIR_PAIR.findall(last)
    if len(found) < 3:
        lines, found = [*lines, last], []
    sides: tuple[list[str], list[str]] = ([], [])
    at = 0
    for line in map(str.strip, lines):
        at = 1 if line.startswith("Negative prompt:") else at
        sides[at].append(line.removeprefix("Negative prompt:").strip() if at else line)
    values = {name: json.loads(v) if v[:1] == v[-1:] == '"' else v for name, v in found}
    return {"Prompt": "\n".join(sides[0]), "Negative": "\n".join(sides[1]), **values}


@pytest.mark.parametrize("prompt", HOSTILE)
@pytest.mark.parametrize("negative", [None, *HOSTILE])
def test_theirs_reads_hostile_prompts_as_ours_does(prompt: str, negative: str | None) -> None:
    text = infotext(ImageParams(prompt, negative, scheduler="DPM Multi"), 5, 'a "b", c: 2, \\')
    assert read_by_theirs(text) == read_back(text)


PIECES = ["Negative prompt:", "\n", "\r", "Steps: 20", ", ", '"', "\\", "Seed: 1, ", "a", "  ", ":"]
PIECED = st.lists(st.sampled_from(PIECES), min_size=1).map("".join)


@given(PIECED | st.text(min_size=1), PIECED | st.text(), PIECED | st.text(min_size=1))
def test_theirs_keeps_any_words_and_the_pairs(prompt: str, negative: str, model: str) -> None:
    text = infotext(ImageParams(prompt, negative), 5, model)
    found = read_by_theirs(text)
    assert (found["Steps"], found["Seed"], found["Size"]) == ("25", "5", "1024x1024")
    assert found["Model"].strip() == model.strip()
    assert found["Prompt"].lstrip(",").split() == prompt.lstrip(",").split()
    assert found["Negative"].lstrip(",").split() == negative.lstrip(",").split()


def test_theirs_takes_a_last_line_of_three_pairs_and_none_of_two() -> None:
    assert read_by_theirs("house\nSteps: 20, Seed: 1")["Prompt"] == "house\nSteps: 20, Seed: 1"
    assert read_by_theirs("house\nSteps: 20, Seed: 1, Size: 1x1")["Prompt"] == "house"


def test_what_is_unusual_is_said_and_nothing_else() -> None:
    plain = infotext(ImageParams("x", seed=1), 1, "micro")
    assert "Clip skip" not in plain and "Scheduler profile" not in plain
    given = ImageParams(
        "x",
        clip_skip=1,
        emphasis="original",
        guidance_end=0.5,
        crop=(64, 0),
        prompt_dialect="plain",
    )
    said = infotext(given, 1, "micro").splitlines()[-1].split(", ")
    assert {
        *("Clip skip: 3", "Emphasis: Original", "Guidance end: 0.5", "Crop: 64x0"),
        "Prompt dialect: Plain",
    } <= set(said)
